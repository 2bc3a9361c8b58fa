"""Ask a trained model about images: `Mimo.load(path).open(image).ask("What is this?", boxes=[[10, 12, 40, 44]])`.

Axis letters: H, W height and width of the original image; B rows of a batch, T prompt bucket, R turns, Q tokens of one
turn's X_q, D width of the language model, S `<SEG>` slots.

CLIP and SAM see an image once, whatever is asked of it. Earlier turns of a chat are never rewritten: their X_q and their
tokens stand, only the new turn is aligned, and only its `<SEG>`s are painted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax import checkpoint as checkpoints
from mimo_jax.config import Config
from mimo_jax.data import conversation
from mimo_jax.data.medical import Picture, Window, open_picture
from mimo_jax.data.prompts import PromptError, Prompts, encode_prompts
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.data.transforms import mask_from_logits, views
from mimo_jax.errors import UserError
from mimo_jax.geometry import Frame, GeometryError, clip_frame, sam_frame, validate_boxes, validate_points, validate_scribbles
from mimo_jax.infer.answer import Answer, Entity
from mimo_jax.infer.generate import Engine
from mimo_jax.infer.write_masks import Grid

_IMAGES = 4  # an image in the towers weighs about as much as so many answers
_LENGTH_STEP = 32  # prompt buckets: 32, 64, 96, 128, then 192, 256, 384, 512, 768, …


@dataclass
class EncodedImage:
    """An image after both towers. pixels uint8 [H, W, 3]; x_img [I, Dc]; features [g, g, C]; spacing_mm of rows and of columns,
    and grid, are those of the medical file that it comes from."""

    pixels: np.ndarray
    clip_frame: Frame
    sam_frame: Frame
    x_img: jax.Array
    features: jax.Array
    spacing_mm: tuple[float, float] | None = None
    grid: Grid = None


@dataclass
class PastTurn:
    """What a finished turn leaves to the later ones. ids, query_index: its tokens from "USER:" to </s>; x_q [Q, D]."""

    ids: list[int]
    query_index: list[int]
    x_q: jax.Array


@dataclass
class Request:
    """One question. image: encoded, or uint8 pixels [H, W, 3]; prompts in pixels of it; past: earlier turns of the chat."""

    image: EncodedImage | np.ndarray
    question: str
    prompts: Prompts = field(default_factory=Prompts)
    max_new_tokens: int | None = None
    past: Sequence[PastTurn] = ()


@dataclass
class _Turn:
    """A request as arrays. ids and query_index: the whole conversation up to where the answer begins; the new turn from
    `start` on. limit: tokens that the answer may have."""

    ids: list[int]
    query_index: list[int]
    start: int
    instruction_ids: np.ndarray  # int32 [L]
    instruction_mask: np.ndarray  # bool [L]
    prompt_xy: np.ndarray
    prompt_kind: np.ndarray
    prompts: Prompts
    limit: int


class Mimo:
    """A model that answers. Not tied to one image; safe to share between chats."""

    def __init__(self, config: Config, params: dict, tokenizer: Tokenizer, origin: str = ""):
        """origin: where the parameters come from, in one line."""
        self.config, self.tokenizer, self.origin = config, tokenizer, origin
        self.engine = Engine(config, params, tokenizer.eos)

    @classmethod
    def load(cls, checkpoint: str | os.PathLike, base: str | os.PathLike | None = None, allow_untrained: bool = False) -> Mimo:
        """From a run directory (its newest whole step), one step, or an import. `base`: where the frozen weights lie, if
        neither the recorded path nor one beside the checkpoint holds them. Raises UserError for what cannot be loaded, and,
        unless `allow_untrained`, for an import some of whose parameters no one has trained yet."""
        config, params, tokenizer_path, _, origin = checkpoints.load_for_inference(checkpoint, base, allow_untrained)
        return cls(config, params, Tokenizer(tokenizer_path, config.model), origin)

    def open(
        self,
        image: str | os.PathLike | np.ndarray | Picture,
        frame: int | None = None,
        slice: str | None = None,
        window: Window = None,
    ) -> Chat:
        """A chat about one image: a file (PNG, JPEG, TIFF, DICOM, NIfTI, …), uint8 pixels [H, W] or [H, W, 3], or what
        `open_picture` made; frame (from 0), slice ("axial:30") and window ((low, high) or a name) are of a file, as
        `open_picture` takes them. UserError if unreadable."""
        picture = read_image(image, frame, slice, window)
        (encoded,) = self.encode([picture.pixels])
        encoded.spacing_mm, encoded.grid = picture.spacing_mm, picture.grid
        return Chat(self, encoded)

    def encode(self, images: Sequence[np.ndarray]) -> list[EncodedImage]:
        """Both towers over uint8 images [H, W, 3], in batches."""
        encoded = []
        size = 1 if len(images) == 1 else max(1, self.config.generate.batch_size // _IMAGES)
        for at in range(0, len(images), size):
            chunk = images[at : at + size]
            seen = [views(pixels, self.config.model) for pixels in chunk]
            arrays = (_stacked([v[name] for v in seen], size) for name in ("clip_image", "clip_size", "sam_image", "sam_size"))
            x_img, features = self.engine.encode(*arrays)
            encoded += [EncodedImage(p, *self._frames(p), x_img[i], features[i]) for i, p in enumerate(chunk)]
        return encoded

    def predict(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer to each request, in order, in batches of `config.generate.batch_size`. Requests that hold the same
        object as image share its encoding. Raises UserError, before anything runs, for a request that cannot be asked."""
        return [answer for answer, _ in self.converse(requests)]

    def check(self, request: Request) -> None:
        """Raises UserError for a request that cannot be asked."""
        self._prepare(request)

    def converse(self, requests: Sequence[Request]) -> list[tuple[Answer, PastTurn]]:
        """`predict`, with what each request's chat needs for its next turn."""
        turns = [self._prepare(request) for request in requests]
        raw = {id(r.image): r.image for r in requests if not isinstance(r.image, EncodedImage)}
        encoded = dict(zip(raw, self.encode(list(raw.values())), strict=True))
        images = [encoded.get(id(r.image), r.image) for r in requests]
        results: list[tuple[Answer, PastTurn] | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].past), _bucket(len(turns[i].ids))))
        size = self._rows(len(requests))
        for at in range(0, len(order), size):
            rows = order[at : at + size]
            made = self._run([requests[i] for i in rows], [images[i] for i in rows], [turns[i] for i in rows], size)
            for i, result in zip(rows, made, strict=True):
                results[i] = result
        return results

    def _rows(self, count: int) -> int:
        """Rows of a batch: one, or the configured number, so that few shapes are compiled."""
        return 1 if count == 1 else self.config.generate.batch_size

    def _frames(self, pixels: np.ndarray) -> tuple[Frame, Frame]:
        m = self.config.model
        height, width = pixels.shape[:2]
        return clip_frame(height, width, m.clip.image_size, m.clip.image_fit), sam_frame(height, width, m.sam.image_size)

    def _prepare(self, request: Request) -> _Turn:
        """Check a request and turn it into arrays; UserError names what is wrong with it."""
        m = self.config.model
        if not isinstance(request.question, str) or not request.question.strip():
            raise UserError("question: is empty; ask something, such as 'Segment the liver.'")
        most = self.config.generate.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        if most < 1:
            raise UserError(f"max_new_tokens: is {most}; give 1 or more")
        image = request.image
        frame = image.clip_frame if isinstance(image, EncodedImage) else self._frames(image)[0]
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
        new_ids, new_index = conversation.prompt_turn(self.tokenizer, self.config, request.question, number, number == 0)
        ids, query_index = ids + new_ids, query_index + new_index
        room = m.llm.max_length - len(ids)
        if room < 1:
            earlier = f" after {start} of earlier turns" if start else ""
            raise UserError(
                f"question: takes {len(new_ids)} tokens{earlier}; the context of {m.llm.max_length} leaves no room to answer, shorten it"
            )
        instruction = conversation.instruction_ids(self.tokenizer, self.config, request.question)
        padding = m.aligner.max_text - len(instruction)
        return _Turn(
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

    def _run(
        self, requests: Sequence[Request], images: Sequence[EncodedImage], turns: Sequence[_Turn], size: int
    ) -> list[tuple[Answer, PastTurn]]:
        """One batch of at most `size` rows; rows that only fill it up generate nothing."""

        def stacked(name: str) -> np.ndarray:
            return _stacked([getattr(t, name) for t in turns], size)

        x_img = _stacked_on_device([i.x_img for i in images], size)
        aligned = ("instruction_ids", "instruction_mask", "prompt_xy", "prompt_kind")
        new_x_q = self.engine.align(x_img, *(stacked(name)[:, None] for name in aligned))[:, 0]  # [B, Q, D]
        x_q = self._with_past(new_x_q, requests)

        length = _bucket(max(len(t.ids) for t in turns))
        input_ids, query_index = np.zeros((size, length), np.int32), np.full((size, length), -1, np.int32)
        lengths, limits = np.ones(size, np.int32), np.zeros(size, np.int32)
        for b, turn in enumerate(turns):
            lengths[b], limits[b] = len(turn.ids), turn.limit
            input_ids[b, : lengths[b]], query_index[b, : lengths[b]] = turn.ids, turn.query_index
        token_mask = np.arange(length) < lengths[:, None]
        usual, most = self.config.generate.max_new_tokens, int(limits.max())
        new_tokens = usual if most <= usual else _bucket(most)
        generated = self.engine.generate(x_q, input_ids, query_index, token_mask, limits, new_tokens)
        ids, probs, counts, ended = jax.device_get((generated.ids, generated.probs, generated.lengths, generated.ended))
        said = [ids[b, : counts[b]].tolist() for b in range(len(turns))]

        places = [[n for n, token in enumerate(row) if token == self.tokenizer.seg] for row in said]
        logits, iou = self._paint(images, generated.states, places, size)
        results = []
        for b, (request, image, turn) in enumerate(zip(requests, images, turns, strict=True)):
            text, pieces, phrases = conversation.parse_ids(self.tokenizer, said[b])
            entities = []
            for k, ((phrase, _, _), place) in enumerate(zip(phrases, places[b], strict=True)):
                mask = mask_from_logits(logits[b, k], image.sam_frame, *image.pixels.shape[:2])
                entities.append(Entity.of(k, phrase, mask, iou[b, k], probs[b, place], image.spacing_mm))
            parts = [{"text": p["text"]} if p["seg"] is None else {"text": p["text"], "entity_id": p["seg"]} for p in pieces]
            answer = Answer(text, parts, entities, not ended[b], request.question, image.pixels, turn.prompts, image.grid)
            results.append((answer, self._past(turn, said[b], new_x_q[b])))
        return results

    def _with_past(self, new_x_q: jax.Array, requests: Sequence[Request]) -> jax.Array:
        """X_q of all turns [B, R, Q, D]: each row's earlier ones as they were, then the new one."""
        turns = _power_of_two(1 + max(len(r.past) for r in requests))
        if turns == 1:
            return new_x_q[:, None]
        nothing = jnp.zeros_like(new_x_q[0])
        rows = []
        for b in range(new_x_q.shape[0]):
            earlier = [turn.x_q for turn in requests[b].past] if b < len(requests) else []
            rows.append(jnp.stack([*earlier, new_x_q[b], *[nothing] * (turns - 1 - len(earlier))]))
        return jnp.stack(rows)

    def _past(self, turn: _Turn, said: list[int], x_q: jax.Array) -> PastTurn:
        """The new turn as later ones see it; an answer that was cut off is closed."""
        ids = [*turn.ids[turn.start :], *said, self.tokenizer.eos]
        query_index = turn.query_index[turn.start :]
        return PastTurn(ids, query_index + [-1] * (len(ids) - len(query_index)), x_q)

    def _paint(
        self, images: Sequence[EncodedImage], states: jax.Array, places: list[list[int]], size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask logits [B, S, M, M] and predicted IoU [B, S] of every `<SEG>`, in one call; none of either if nobody said one."""
        most = max(map(len, places))
        if not most:
            return np.zeros((size, 0, 0, 0), np.float32), np.zeros((size, 0), np.float32)
        index = np.zeros((size, _power_of_two(most)), np.int32)
        for b, row in enumerate(places):
            index[b, : len(row)] = row
        return jax.device_get(self.engine.segment(_stacked_on_device([i.features for i in images], size), states, index))


class Chat:
    """Questions about one image, which is encoded once. `answers`: what was said so far, oldest first."""

    def __init__(self, mimo: Mimo, image: EncodedImage):
        self.mimo, self.image = mimo, image
        self.answers: list[Answer] = []
        self._past: list[PastTurn] = []

    def ask(
        self,
        question: str,
        points: Sequence[Sequence[float]] = (),
        boxes: Sequence[Sequence[float]] = (),
        scribbles: Sequence[Sequence[Sequence[float]]] = (),
        max_new_tokens: int | None = None,
    ) -> Answer:
        """The next turn. points [[x, y, label]] (1 in, 0 out), boxes [[x0, y0, x1, y1]] half-open, scribbles [[[x, y], …]],
        all in pixels of the image, integers being pixel centres. UserError for input that cannot be asked; the chat then
        stands as it was."""
        request = Request(self.image, question, Prompts(points, boxes, scribbles), max_new_tokens, self._past)
        ((answer, past),) = self.mimo.converse([request])
        self.answers.append(answer)
        self._past.append(past)
        return answer


def read_image(
    image: str | os.PathLike | np.ndarray | Picture, frame: int | None = None, slice: str | None = None, window: Window = None
) -> Picture:
    """A file, or uint8 pixels [H, W] or [H, W, 3], as a Picture; one that is there already stays. UserError for anything else,
    and for frame, slice or window without a file."""
    if not isinstance(image, np.ndarray | Picture):
        return open_picture(image, frame=frame, slice=slice, window=window)
    for name, value in (("frame", frame), ("slice", slice), ("window", window)):
        if value is not None:
            raise UserError(f"{name} {value}: is for a file; these are pixels already, leave it away")
    if isinstance(image, Picture):
        return image
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f"image: an array {image.dtype}{list(image.shape)}; give uint8 [height, width, 3] or [height, width]")
    return Picture(image)


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


def _bucket(length: int) -> int:
    """The least prompt bucket that holds `length` tokens: multiples of 32 up to 128, then steps of a half and a third more."""
    if length <= 4 * _LENGTH_STEP:
        return -(-length // _LENGTH_STEP) * _LENGTH_STEP
    power = _power_of_two(length)
    return power * 3 // 4 if length <= power * 3 // 4 else power


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _stacked(rows: Sequence[np.ndarray], size: int) -> np.ndarray:
    """[size, …]: the rows, then the first one again until the batch is full."""
    return np.stack([*rows, *[rows[0]] * (size - len(rows))])


def _stacked_on_device(rows: Sequence[jax.Array], size: int) -> jax.Array:
    return jnp.stack([*rows, *[rows[0]] * (size - len(rows))])
