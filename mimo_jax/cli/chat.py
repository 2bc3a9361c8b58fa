"""`mimo chat`: a conversation about one image, a line for each question, the answer as it comes."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from mimo_jax.cli.arg_types import box, point, scribble
from mimo_jax.errors import UserError
from mimo_jax.infer.answers.answer import NOTHING_PAINTED, Entity
from mimo_jax.infer.predictor import Chat

HELP = """/point X,Y,LABEL     mark a point for the next question; label 1: in, 0: out
/box X0,Y0,X1,Y1     mark a box; x1 and y1 are outside
/scribble X,Y X,Y …  mark a stroke
/prompts FILE        mark what a mask image or a JSON file holds
/clear               take the marks back
/save FILE …         write the last answer: .png, .json, .npy, .nii.gz, .dcm
/new                 forget the conversation; the image stays
/help, /quit"""
_MARKS = {"/point": ("points", point), "/box": ("boxes", box), "/scribble": ("scribbles", scribble)}


class Session:
    """The lines of a conversation. What cannot be done is said in one line, and the conversation goes on."""

    def __init__(self, chat: Chat, out: TextIO, max_new_tokens: int | None = None, temperature: float = 0.0, seed: int = 0):
        self.chat, self.out = chat, out
        self.options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        self.marks: dict[str, Any] = {}
        self.failed = 0  # lines that could not be done

    def run(self, lines: Iterable[str]) -> None:
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            try:
                self.command(line) if line.startswith("/") else line and self.ask(line)
            except (UserError, argparse.ArgumentTypeError) as error:
                self.failed += 1
                self.say(f"! {error}")
            except KeyboardInterrupt:
                self.say("\n! interrupted; the question was not asked")

    def say(self, text: str, end: str = "\n") -> None:
        print(text, end=end, file=self.out, flush=True)

    def ask(self, question: str) -> None:
        """One turn; its marks count for it alone."""
        entities: list[Entity] = []
        for event in self.chat.stream(question, **self.marks, **self.options):
            self.say(event.text, end="")
            entities += [event.entity] if event.entity else []
        self.marks = {}
        answer = self.chat.answers[-1]
        self.say("\n(cut off at the token limit)" if answer.truncated else "")
        for entity in answer.entities:
            self.say(f"  {entity.describe()}")
        if not answer.entities:
            self.say(NOTHING_PAINTED)

    def command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in _MARKS:
            kind, parse = _MARKS[name]
            self.marks.setdefault(kind, []).append(parse(rest))
        elif name == "/prompts" and rest:
            self.marks["prompts"] = rest
        elif name == "/clear":
            self.marks = {}
        elif name == "/new":
            self.chat, self.marks = Chat(self.chat.mimo, self.chat.image), {}
        elif name == "/save" and rest:
            self.save(_words(rest))
        elif name == "/help":
            self.say(HELP)
        else:
            raise UserError(f"{line}: is not understood; /help lists what is")

    def save(self, paths: list[str]) -> None:
        if not self.chat.answers:
            raise UserError("/save: nothing was answered yet")
        self.chat.answers[-1].save(*paths)
        self.say(f"written to {', '.join(paths)}")


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"/save {text}: {error}") from None


def typed(prompt: str = "> ", read: Callable[[str], str] = input) -> Iterable[str]:
    """Lines from the keyboard, with editing and history where the terminal has them; Ctrl-C empties a line, Ctrl-D ends."""
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


def converse(chat: Chat, **options) -> int:
    """A session on standard input: typed at a terminal, or lines from a pipe or file. Returns how many lines could not be done."""
    session = Session(chat, sys.stdout, **options)
    if sys.stdin.isatty():
        session.say("Ask, or /help. Research use only.")
    session.run(typed() if sys.stdin.isatty() else sys.stdin)
    return session.failed
