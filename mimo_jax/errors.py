"""The root of every error that is the user's to mend."""


class UserError(ValueError):
    """A mistake in a file, a flag or a setting. The message is one line that names it and says what to do;
    the command line prints that line, without a traceback, and exits with code 2. With `listing`, lines follow it that
    list what is wrong, one thing each."""

    listing = False
