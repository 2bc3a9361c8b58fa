"""What is asked: an image that both towers have seen, a question with what the user marked, and the turns before it.

Axis letters: H, W height and width of the original image in pixels; I, Dc tokens and width of X_img; g, C side and width of SAM's
features; Q, D tokens and width of one turn's X_q; L instruction tokens of the aligner, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real

import jax
import numpy as np

from mimo_jax.config import Config
from mimo_jax.data import conversation
from mimo_jax.data.images.image import MedicalImage
from mimo_jax.data.prompts import PromptError, Prompts, encode_prompts
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.errors import UserError
from mimo_jax.geometry import Frame, GeometryError, validate_boxes, validate_points, validate_scribbles

MAX_TURNS = 32  # of a conversation
MAX_STOPS = 8  # stop strings of a request
_MAX_SEED = 2**32
_CHARACTERS = 64  # more than any token stands for, on average


@dataclass(eq=False)
class EncodedImage:
    """A picture after both towers. x_img [I, Dc] and features [g, g, C] are None while they are not kept: the store may let them
    go, and they are made again from the picture when they are asked for."""

    picture: MedicalImage
    vision_frame: Frame
    sam_frame: Frame
    x_img: jax.Array | None = None
    features: jax.Array | None = None

    @property
    def pixels(self) -> np.ndarray:
        """uint8 RGB [H, W, 3]."""
        return self.picture.pixels

    @property
    def nbytes(self) -> int:
        return 0 if self.x_img is None or self.features is None else self.x_img.nbytes + self.features.nbytes

    def release(self) -> None:
        self.x_img = self.features = None


@dataclass
class TurnHistory:
    """What a finished turn leaves to the later ones. ids, query_index: its tokens from "USER:" to </s>; x_q [Q, D]."""

    ids: list[int]
    query_index: list[int]
    x_q: jax.Array


@dataclass(eq=False)
class TurnCache:
    """The KV cache of a chat, one row. length: how many tokens of the conversation, from its first on, it holds; 0 while there is
    none, or after the store has let it go: the next turn then prefills all."""

    arrays: dict[str, jax.Array] | None = None
    length: int = 0

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in (self.arrays or {}).values())

    def release(self) -> None:
        self.arrays, self.length = None, 0


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: the likeliest; else drawn from the fewest likeliest that make up top_p, the same ones
    for the same seed whatever else is in the batch. stop: the answer ends before the first of these strings."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """UserError for values that mean nothing."""
        if not (isinstance(self.temperature, Real) and 0 <= self.temperature <= 100):
            raise UserError(f"temperature: is {self.temperature}; give 0 (the likeliest words) up to 100")
        if not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise UserError(f"top_p: is {self.top_p}; give more than 0 and at most 1")
        if not (isinstance(self.seed, Integral) and 0 <= self.seed < _MAX_SEED):
            raise UserError(f"seed: is {self.seed}; give a whole number from 0 to {_MAX_SEED - 1}")
        if len(self.stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in self.stop):
            raise UserError(f"stop: give at most {MAX_STOPS} strings, none of them empty")


@dataclass
class Request:
    """One question. image: encoded, a picture, or uint8 pixels [H, W, 3]; prompts in pixels of it; past: earlier turns of the chat;
    cache: what is kept of them, of a request that runs alone."""

    image: EncodedImage | MedicalImage | np.ndarray
    question: str
    prompts: Prompts = field(default_factory=Prompts)
    max_new_tokens: int | None = None
    past: Sequence[TurnHistory] = ()
    sampling: Sampling = Sampling()
    cache: TurnCache | None = None


@dataclass
class EncodedTurn:
    """A request as arrays. ids and query_index: the whole conversation up to where the answer begins; the new turn from `start` on.
    limit: tokens that the answer may have."""

    ids: list[int]
    query_index: list[int]
    start: int
    instruction_ids: np.ndarray  # int32 [L]
    instruction_mask: np.ndarray  # bool [L]
    prompt_xy: np.ndarray  # float32 [P, 2]
    prompt_kind: np.ndarray  # int32 [P]
    prompts: Prompts
    limit: int


def prepare(request: Request, frame: Frame, tokenizer: Tokenizer, config: Config) -> EncodedTurn:
    """Check a request on an image of this CLIP frame and turn it into arrays; UserError names what is wrong with it."""
    m = config.model
    if not isinstance(request.question, str) or not request.question.strip():
        raise UserError("question: is empty; ask something, such as 'Segment the liver.'")
    most = config.generate.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
    if not isinstance(most, Integral) or most < 1:
        raise UserError(f"max_new_tokens: is {most}; give a whole number of 1 or more")
    if len(request.past) >= MAX_TURNS:
        raise UserError(f"question: is turn {len(request.past) + 1} of a conversation, which may have {MAX_TURNS}; open the image anew")
    request.sampling.check()
    prompts = _checked(request.prompts, frame)
    if prompts and m.aligner.image_only():
        raise UserError(f"this model's aligner ({m.aligner.kind}) reads no points, boxes or scribbles; ask without them")
    try:
        xy, kind = encode_prompts(prompts, frame, m.prompt)
    except PromptError as error:
        raise UserError(f"prompts: {error}") from None

    ids = [i for turn in request.past for i in turn.ids]
    query_index = [q for turn in request.past for q in turn.query_index]
    number, start = len(request.past), len(ids)
    if len(request.question) > _CHARACTERS * m.llm.max_length:  # no need to tokenise it to know
        raise UserError(f"question: has {len(request.question)} characters; the context is {m.llm.max_length} tokens, shorten it")
    new_ids, new_index = conversation.encode_user_turn(tokenizer, config, request.question, number, number == 0)
    ids, query_index = ids + new_ids, query_index + new_index
    room = m.llm.max_length - len(ids)
    if room < 1:
        earlier = f" after {start} of earlier turns" if start else ""
        raise UserError(
            f"question: takes {len(new_ids)} tokens{earlier}; the context of {m.llm.max_length} leaves no room to answer, shorten it"
        )
    instruction = conversation.instruction_ids(tokenizer, config, request.question)
    padding = m.aligner.max_text - len(instruction)
    return EncodedTurn(
        ids=ids,
        query_index=query_index,
        start=start,
        instruction_ids=np.pad(np.array(instruction, np.int32), (0, padding)),
        instruction_mask=np.arange(m.aligner.max_text) < len(instruction),
        prompt_xy=xy,
        prompt_kind=kind,
        prompts=prompts,
        limit=min(most, room),
    )


def _checked(prompts: Prompts, frame: Frame) -> Prompts:
    """The same prompts as arrays; UserError for NaN, a place outside the image, or a box without area."""
    try:
        return Prompts(
            validate_points(prompts.points, frame.height, frame.width),
            validate_boxes(prompts.boxes, frame.height, frame.width),
            validate_scribbles(prompts.scribbles, frame.height, frame.width),
        )
    except GeometryError as error:
        raise UserError(str(error)) from None
