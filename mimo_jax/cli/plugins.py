"""The user's own modules, which are imported before a command runs and register parts of the model, metrics or dataset readers."""

from __future__ import annotations

import importlib
import os

from mimo_jax.errors import UserError

VARIABLE = "MIMO_PLUGINS"


def import_plugins() -> None:
    """Import the modules that MIMO_PLUGINS names, separated by commas. Raises UserError for a module that is not found; errors that a
    module itself raises are not changed."""
    for name in filter(None, (word.strip() for word in os.environ.get(VARIABLE, "").split(","))):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise UserError(f"{VARIABLE}: there is no module {name}; add the folder that contains it to PYTHONPATH") from None
