"""Requests to the engine: an encoded image, a question with its prompts, and the earlier turns of the chat.

Axis letters: H, W height and width of the original image in pixels; I, Dc tokens and width of X_img; g, C side and width of SAM's
features; Q, D tokens and width of one turn's X_q; L instruction tokens of the aligner, P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from mimo_jax.config import Config
from mimo_jax.data import conversation
from mimo_jax.data.images.image import MedicalImage
from mimo_jax.data.prompts import PromptError, Prompts, encode_prompts
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.errors import UserError
from mimo_jax.geometry import Frame, GeometryError, validate_boxes, validate_points, validate_scribbles

if TYPE_CHECKING:
    from mimo_jax.models.mimo import Features

MAX_TURNS = 32  # per conversation
MAX_STOPS = 8  # maximum number of stop strings per request
_EXTREME_RATIO = 16  # of the sides of an image, from which its shorter side has few pixels
_MAX_SEED = 2**32
_MAX_CHARACTERS_PER_TOKEN = 64  # upper bound of the average number of characters per token


@dataclass(eq=False)
class EncodedImage:
    """An image with the outputs of both encoders. x_img [I, Dc] and features [g, g, C] are None after the device cache has released
    them; they are then recomputed from the image when they are needed. pooled: see `answers.familiarity.pooled`; None if the model has
    nothing to compare it with."""

    picture: MedicalImage
    vision_frame: Frame
    sam_frame: Frame
    x_img: jax.Array | None = None
    features: Features | None = None
    pooled: np.ndarray | None = None

    @property
    def pixels(self) -> np.ndarray:
        """uint8 RGB [H, W, 3]."""
        return self.picture.pixels

    @property
    def nbytes(self) -> int:
        return 0 if self.x_img is None else sum(leaf.nbytes for leaf in jax.tree.leaves((self.x_img, self.features)))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Those of the picture, and the one about its shape."""
        return (*self.picture.warnings, *self.shape_warnings())

    def shape_warnings(self) -> list[str]:
        """The line about an image so long or high that little of it is left in the frames of the model."""
        height, width = self.pixels.shape[:2]
        if max(height, width) < _EXTREME_RATIO * min(height, width):
            return []
        seen, outlined = (f"{frame.size[1]}x{frame.size[0]}" for frame in (self.vision_frame, self.sam_frame))
        what = f"extreme shape: the model sees {width}x{height} pixels as {seen}, and outlines structures in {outlined}"
        return [f"{what}; cut the image into parts"]

    def release(self) -> None:
        self.x_img = self.features = None


@dataclass
class TurnHistory:
    """The data of a finished turn that later turns need. ids, query_index: its tokens from "USER:" to </s>; x_q [Q, D]."""

    ids: list[int]
    query_index: list[int]
    x_q: jax.Array


@dataclass(eq=False)
class TurnCache:
    """The KV cache of a chat, one row. slots: number of tokens that it has room for. length: number of tokens from the start of the
    conversation that it holds; 0 if it is empty or was released, so that the next turn prefills the full conversation."""

    arrays: Any = None
    slots: int = 0
    length: int = 0

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.arrays))

    def release(self) -> None:
        self.arrays, self.slots, self.length = None, 0, 0


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. temperature 0: greedy; otherwise nucleus sampling with `top_p`, reproducible for a seed whatever else is in
    the batch. stop: the answer ends before the first of these strings."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UserError for invalid values."""
        if not (isinstance(self.temperature, Real) and 0 <= self.temperature <= 100):
            raise UserError(f"temperature: is {self.temperature}; give a number from 0 (greedy) to 100")
        if not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise UserError(f"top_p: is {self.top_p}; give a number above 0 and at most 1")
        if not (isinstance(self.seed, Integral) and 0 <= self.seed < _MAX_SEED):
            raise UserError(f"seed: is {self.seed}; give a whole number from 0 to {_MAX_SEED - 1}")
        if len(self.stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in self.stop):
            raise UserError(f"stop: give at most {MAX_STOPS} strings, none of them empty")


@dataclass
class Request:
    """One question. image: encoded, a MedicalImage, or uint8 pixels [H, W, 3]; prompts: in pixels of the image; past: earlier turns of the
    chat; cache: KV cache of these turns, used only if the request runs alone."""

    image: EncodedImage | MedicalImage | np.ndarray
    question: str
    prompts: Prompts = field(default_factory=Prompts)
    max_new_tokens: int | None = None
    past: Sequence[TurnHistory] = ()
    sampling: Sampling = Sampling()
    cache: TurnCache | None = None


@dataclass
class EncodedTurn:
    """A request as arrays. question: as the model reads it. ids, query_index: the full conversation up to the start of the answer; the new
    turn begins at `start`. limit: maximum number of tokens in the answer."""

    question: str
    ids: list[int]
    query_index: list[int]
    start: int
    instruction_ids: np.ndarray  # int32 [L]
    instruction_mask: np.ndarray  # bool [L]
    prompt_xy: np.ndarray  # float32 [P, 2]
    prompt_kind: np.ndarray  # int32 [P]
    prompts: Prompts
    limit: int


def encode_request(request: Request, frame: Frame, tokenizer: Tokenizer, config: Config) -> EncodedTurn:
    """Check a request and turn it into arrays; frame: the vision frame of its image. Raises UserError, which names what is wrong."""
    m = config.model
    conversation.check_question(request.question)
    max_new_tokens = config.generate.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 1:
        raise UserError(f"max_new_tokens: is {max_new_tokens}; give a whole number of 1 or more")
    if len(request.past) >= MAX_TURNS:
        raise UserError(f"question: is turn {len(request.past) + 1} of a conversation, which may have {MAX_TURNS}; open the image again")
    request.sampling.check()
    prompts = _validate_prompts(request.prompts, frame)
    if prompts and m.aligner.image_only():
        raise UserError(f"this model's aligner ({m.aligner.kind}) takes no points, boxes or scribbles; ask without them")
    try:
        xy, kind = encode_prompts(prompts, frame, m.prompt)
    except PromptError as error:
        raise UserError(f"prompts: {error}") from None

    ids = [i for turn in request.past for i in turn.ids]
    query_index = [q for turn in request.past for q in turn.query_index]
    number, start = len(request.past), len(ids)
    if len(request.question) > _MAX_CHARACTERS_PER_TOKEN * m.llm.max_length:  # too long for any tokenisation
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
        question=request.question,
        ids=ids,
        query_index=query_index,
        start=start,
        instruction_ids=np.pad(np.array(instruction, np.int32), (0, padding)),
        instruction_mask=np.arange(m.aligner.max_text) < len(instruction),
        prompt_xy=xy,
        prompt_kind=kind,
        prompts=prompts,
        limit=min(max_new_tokens, room),
    )


def _validate_prompts(prompts: Prompts, frame: Frame) -> Prompts:
    """The prompts as arrays; raises UserError for NaN, coordinates outside the image, or a box without area."""
    try:
        return Prompts(
            validate_points(prompts.points, frame.height, frame.width),
            validate_boxes(prompts.boxes, frame.height, frame.width),
            validate_scribbles(prompts.scribbles, frame.height, frame.width),
        )
    except GeometryError as error:
        raise UserError(str(error)) from None
