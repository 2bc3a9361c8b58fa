"""`mimo chat`: an interactive conversation about one image; each line is a question, and answers are streamed."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from mimo_jax.cli.arg_types import box, point, scribble
from mimo_jax.errors import UserError
from mimo_jax.infer.answers.answer import Entity
from mimo_jax.infer.predictor import Chat

HELP = """/point X,Y,LABEL     add a point to the next question; label 1: inside, 0: outside
/box X0,Y0,X1,Y1     add a box; x1 and y1 are exclusive
/scribble X,Y X,Y …  add a stroke
/prompts FILE        add the prompts of a mask image or a JSON file
/clear               remove these prompts
/save FILE …         write the last answer: .png, .json, .npy, .nii.gz, .dcm
/new                 start a new conversation about the same image
/help, /quit"""
_PROMPTS = {"/point": ("points", point), "/box": ("boxes", box), "/scribble": ("scribbles", scribble)}


class ChatSession:
    """Processes the lines of a conversation. An error is printed in one line, and the conversation continues."""

    def __init__(self, chat: Chat, out: TextIO, **options: Any):
        """options: arguments of `Chat.request` for all questions."""
        self.chat, self.out, self.options = chat, out, options
        self.prompts: dict[str, Any] = {}
        self.failed = 0  # number of lines with an error

    def run(self, lines: Iterable[str]) -> None:
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            try:
                self.command(line) if line.startswith("/") else line and self.ask(line)
            except (UserError, argparse.ArgumentTypeError) as error:
                self.failed += 1
                self.print(f"! {error}")
            except KeyboardInterrupt:
                self.print("\n! interrupted; the question was not asked")

    def print(self, text: str, end: str = "\n") -> None:
        print(text, end=end, file=self.out, flush=True)

    def ask(self, question: str) -> None:
        """Ask one turn with the current prompts, which are then removed."""
        entities: list[Entity] = []
        for event in self.chat.stream(question, **self.prompts, **self.options):
            self.print(event.text, end="")
            entities += [event.entity] if event.entity else []
        self.prompts = {}
        answer = self.chat.answers[-1]
        self.print("")
        for entity in answer.entities:
            self.print(f"  {entity.describe()}")
        for note in answer.notes():
            self.print(note)

    def command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in _PROMPTS:
            kind, parse = _PROMPTS[name]
            self.prompts.setdefault(kind, []).append(parse(rest))
        elif name == "/prompts" and rest:
            self.prompts["prompts"] = rest
        elif name == "/clear":
            self.prompts = {}
        elif name == "/new":
            self.chat, self.prompts = Chat(self.chat.mimo, self.chat.image), {}
        elif name == "/save" and rest:
            self.save(_words(rest))
        elif name == "/help":
            self.print(HELP)
        else:
            raise UserError(f"{line}: is not a command; see /help")

    def save(self, paths: list[str]) -> None:
        if not self.chat.answers:
            raise UserError("/save: there is no answer yet")
        self.chat.answers[-1].save(*paths)
        self.print(f"written to {', '.join(paths)}")


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"/save {text}: {error}") from None


def keyboard_lines(prompt: str = "> ", read: Callable[[str], str] = input) -> Iterable[str]:
    """Yield lines from the keyboard, with editing and history if readline is available; Ctrl-C clears a line, Ctrl-D ends."""
    try:
        import readline  # noqa: F401, it changes what input() does
    except ImportError:
        pass
    while True:
        try:
            yield read(prompt)
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def run_chat(chat: Chat, **options) -> int:
    """Run a session on standard input, which is a terminal, a pipe or a file. Returns the number of lines with an error."""
    session = ChatSession(chat, sys.stdout, **options)
    if sys.stdin.isatty():
        session.print("Ask, or /help. Research use only.")
    session.run(keyboard_lines() if sys.stdin.isatty() else sys.stdin)
    return session.failed
