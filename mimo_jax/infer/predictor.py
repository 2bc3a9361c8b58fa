"""Ask a trained model about images: `Mimo.load(path).open(image).ask("What is this?", boxes=[[10, 12, 40, 44]])`.

Axis letters: H, W height and width of the original image in pixels; Q, D tokens and width of one turn's X_q.

The vision tower and SAM encode an image once, however many questions are asked. Earlier turns of a chat are never recomputed: their
X_q, tokens, keys and values are reused; only the new turn is aligned and prefilled, and only its `<SEG>`s are segmented.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mimo_jax.checkpoints import loading
from mimo_jax.checkpoints.checkpoint import FAMILIARITY
from mimo_jax.config import Config
from mimo_jax.data import conversation
from mimo_jax.data.images.image import MedicalImage, Volume, Window
from mimo_jax.data.images.volume import open_scan
from mimo_jax.data.prompt_files import Source, join_prompts, read_prompts
from mimo_jax.data.prompts import Prompts
from mimo_jax.data.tokenizer import Tokenizer, load_tokenizer
from mimo_jax.data.transforms import preprocess
from mimo_jax.errors import UserError
from mimo_jax.geometry import Frame, sam_frame, vision_frame
from mimo_jax.infer.answers.answer import Answer, Entity
from mimo_jax.infer.answers.calibration import UNCALIBRATED, Calibration
from mimo_jax.infer.answers.familiarity import Familiarity, pooled
from mimo_jax.infer.engine.compiled import Engine
from mimo_jax.infer.engine.decode_batch import DecodeBatch, bucket, cache_bucket, stacked
from mimo_jax.infer.engine.device_cache import DeviceCache
from mimo_jax.infer.engine.requests import EncodedImage, EncodedTurn, Request, Sampling, TurnCache, TurnHistory, encode_request

_IMAGE_COST = 4  # encoding an image needs about as much memory as this many answers
_FIRST_STEP, _NEXT_STEP = 1, 4  # tokens per decoding step of a streamed answer
_WARM_UP_MASKS = (1, 2, 4)  # numbers of masks in an answer that `warm_up` compiles for

_log = logging.getLogger("mimo_jax")  # only shapes, counts and seconds: no names and no text


@dataclass(frozen=True)
class Event:
    """One event of a streamed answer: more `text` (all pieces together are the answer's text), a newly segmented `entity`, or, as the
    last event, the complete `answer`."""

    text: str = ""
    entity: Entity | None = None
    answer: Answer | None = None


class Mimo:
    """A loaded model. It can be shared between chats and images, one request at a time."""

    def __init__(
        self,
        config: Config,
        params: dict,
        tokenizer: Tokenizer,
        origin: str = "",
        calibration: Calibration = UNCALIBRATED,
        calibration_path: Path | None = None,
        familiarity: Familiarity | None = None,
    ):
        """origin: one line that says where the parameters come from; calibration_path: path of the calibration of their step, which may not
        exist; familiarity: what is known of the training data, if it was fitted."""
        self.familiarity = familiarity or Familiarity()
        self.config, self.tokenizer, self.origin = config, tokenizer, origin
        self.calibration, self.calibration_path = calibration, calibration_path
        self.engine = Engine(config, params, conversation.stop_id(tokenizer, config))
        self.device_cache = DeviceCache(config.generate.cache_mb * 2**20)

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike,
        base: str | os.PathLike | None = None,
        allow_untrained: bool = False,
        quantization: str = "",
        warm_up: bool = False,
    ) -> Mimo:
        """Load a run directory (its newest complete step), one step, or an import. All visible devices share the model.

        base: folder of the frozen parameters, if they are neither at the recorded path nor next to the checkpoint. quantization: "int8" or
        "int4" stores the matrices of the language model as integers, with a half or a quarter of the memory of bf16. warm_up: see
        `warm_up`. Raises UserError if the checkpoint cannot be loaded or, unless `allow_untrained`, has untrained parameters."""
        config, params, tokenizer_path, _, origin, path = loading.load_for_inference(checkpoint, base, allow_untrained, quantization)
        fitted = (Calibration.read(path), path, Familiarity.read(path.with_name(FAMILIARITY)))
        mimo = cls(config, params, load_tokenizer(tokenizer_path, config.model), origin, *fitted)
        if warm_up:
            mimo.warm_up()
        return mimo

    def open(
        self,
        image: str | os.PathLike | np.ndarray | MedicalImage,
        frame: int | None = None,
        slice: str | None = None,
        series: int | None = None,
        window: Window = None,
    ) -> Chat:
        """Start a chat about one image: a file (PNG, JPEG, TIFF, DICOM, NIfTI, …), a slice of a folder of DICOM files, uint8 pixels [H, W]
        or [H, W, 3], or a MedicalImage. frame (from 0), slice ("axial:30"), series and window ((low, high) or a name) select from a file
        or folder as in `open_scan`. Raises UserError if the image cannot be read."""
        (encoded,) = self.encode([read_image(image, frame=frame, slice=slice, series=series, window=window)])
        return Chat(self, encoded)

    def encode(self, images: Sequence[MedicalImage | np.ndarray]) -> list[EncodedImage]:
        """Encode MedicalImages or uint8 pixels [H, W, 3] with the vision tower and SAM, in batches."""
        opened = [image if isinstance(image, MedicalImage) else MedicalImage(image) for image in images]
        encoded = [EncodedImage(image, *self._frames(image.pixels)) for image in opened]
        for image in encoded:
            for line in image.shape_warnings():
                warnings.warn(line, stacklevel=3)
        self._encode(encoded)
        self.device_cache.keep(*encoded)
        return encoded

    def _encode(self, images: Sequence[EncodedImage]) -> None:
        size = 1 if len(images) == 1 else max(1, self.config.generate.batch_size // _IMAGE_COST)
        for at in range(0, len(images), size):
            chunk = images[at : at + size]
            inputs = [preprocess(image.pixels, self.config.model) for image in chunk]
            x_img, features = self.engine.encode({name: stacked([v[name] for v in inputs], size) for name in inputs[0]}, len(chunk))
            for i, image in enumerate(chunk):
                image.x_img, image.features = x_img[i], jax.tree.map(lambda scale, i=i: scale[i], features)
                if image.pooled is None and len(self.familiarity.images):
                    image.pooled = self._pooled(image)

    def pooled_features(self, images: Sequence[MedicalImage | np.ndarray]) -> list[np.ndarray]:
        """What `answers.familiarity` compares images by, float32 [D] each."""
        return [self._pooled(image) for image in self.encode(images)]

    def _pooled(self, image: EncodedImage) -> np.ndarray:
        own = not self.config.model.vision.from_sam()  # else X_img contains SAM's features
        return pooled(image.x_img, jax.tree.leaves(image.features) if own else ())

    def predict(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request, in order, computed in batches of `config.generate.batch_size`. Requests whose image is the same
        object share its encoding. Raises UserError, before anything runs, for an invalid request."""
        return [answer for answer, _ in self.generate(requests)]

    def check(self, request: Request) -> None:
        """Raises UserError for an invalid request."""
        self._prepare(request)

    def generate(self, requests: Sequence[Request]) -> list[tuple[Answer, TurnHistory]]:
        """Like `predict`, but each answer comes with the history that the next turn of its chat needs."""
        turns = [self._prepare(request) for request in requests]
        raw = {id(r.image): r.image for r in requests if not isinstance(r.image, EncodedImage)}
        encoded = dict(zip(raw, self.encode(list(raw.values())), strict=True))
        images = [encoded.get(id(r.image), r.image) for r in requests]
        results: list[tuple[Answer, TurnHistory] | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].past), len(turns[i].ids)))
        size = self._num_rows(len(requests))
        for at in range(0, len(order), size):
            rows = order[at : at + size]
            batch = self._start_batch([requests[i] for i in rows], [images[i] for i in rows], [turns[i] for i in rows])
            batch.decode()
            for i, result in zip(rows, self.finish(batch), strict=True):
                results[i] = result
        return results

    def start(self, request: Request) -> DecodeBatch:
        """Start one request for step-by-step decoding; call `finish` once the batch is done."""
        image = request.image if isinstance(request.image, EncodedImage) else self.encode([request.image])[0]
        return self._start_batch([request], [image], [self._prepare(request)])

    def _start_batch(self, requests: Sequence[Request], images: Sequence[EncodedImage], turns: Sequence[EncodedTurn]) -> DecodeBatch:
        """Prefill a batch; images whose features the device cache has released are encoded again."""
        self.started = time.perf_counter()
        self._encode([image for image in dict.fromkeys(images) if image.features is None])
        self.device_cache.keep(*images)
        return DecodeBatch(
            self.engine,
            self.config,
            self.tokenizer,
            self.calibration,
            self.familiarity,
            requests,
            images,
            turns,
            self._num_rows(len(requests)),
        )

    def finish(self, batch: DecodeBatch) -> list[tuple[Answer, TurnHistory]]:
        """The answers of a batch that is done, each with the history that the next turn of its chat needs."""
        results = batch.finish()
        self.device_cache.keep(*batch.images, *(request.cache for request in batch.requests if request.cache))
        num_prompted = sum(bool(turn.prompts) for turn in batch.turns)
        shape = f"{len(batch.turns)} questions ({num_prompted} with prompts), {sum(map(len, batch.generated_ids))} tokens"
        num_masks = sum(len(answer.entities) for answer, _ in results)
        _log.info("request %s: %s, %d masks, %.2f s", secrets.token_hex(4), shape, num_masks, time.perf_counter() - self.started)
        return results

    def _num_rows(self, count: int) -> int:
        """Number of rows of a batch: one or the configured number, so that few shapes are compiled."""
        return 1 if count == 1 else self.config.generate.batch_size

    def _frames(self, pixels: np.ndarray) -> tuple[Frame, Frame]:
        m = self.config.model
        height, width = pixels.shape[:2]
        vision = vision_frame(height, width, m.vision.image_size, m.vision.image_fit)
        return vision, sam_frame(height, width, m.sam.image_size, m.sam.image_fit)

    def _prepare(self, request: Request) -> EncodedTurn:
        image = request.image
        if isinstance(request.question, str):
            request = dataclasses.replace(request, question=self.familiarity.readable(request.question))
        if not isinstance(image, EncodedImage):
            pixels = image.pixels if isinstance(image, MedicalImage) else image
            return encode_request(request, self._frames(pixels)[0], self.tokenizer, self.config)
        return encode_request(request, image.vision_frame, self.tokenizer, self.config)

    def warm_up(self, progress: bool = False) -> None:
        """Compile everything that a chat needs, so that no question waits for it: the encoders, every cache size with every turn length up
        to the longest question that the aligner does not truncate, and answers of the default length with up to 4 masks."""
        (image,) = self.encode([np.zeros((8, 8, 3), np.uint8)])
        m = self.config.model
        queries, new_tokens, max_length = m.query_tokens(), self.config.generate.max_new_tokens, m.llm.max_length
        shortest = len(conversation.encode_user_turn(self.tokenizer, self.config, "?", 1, False)[0])
        longest = len(conversation.encode_user_turn(self.tokenizer, self.config, "?", 0, True)[0]) + m.aligner.max_text
        lengths = sorted({bucket(n) for n in range(shortest, longest + 1)})
        sizes = sorted({cache_bucket(min(n + new_tokens, max_length)) for n in range(shortest, max_length)})
        pairs = [(length, size) for size in sizes for length in lengths if length <= size]
        for length, size in tqdm(pairs, desc="compile", unit="shape", disable=None if progress else True):
            kept = max(0, size - length - new_tokens)  # tokens of earlier turns in the cache
            request = Request(
                image, "?", past=[TurnHistory([], [], None)] if kept else (), cache=TurnCache(self.engine.new_cache(1, size), size, kept)
            )
            first = queries if kept else 0
            turn = self._prepare(Request(image, "?"))
            turn.start, turn.limit = kept, 1
            turn.ids = [self.tokenizer.pad] * (kept + length)
            turn.query_index = [-1] * kept + [*range(first, first + queries), *[-1] * (length - queries)]
            batch = self._start_batch([request], [image], [turn])
            batch.decode()
            self.finish(batch)
        for count in _WARM_UP_MASKS:
            batch.generated_ids, batch.entities = [[self.tokenizer.seg] * count], [[]]
            batch.decode_masks()
        for i, size in enumerate(sizes):
            for larger in sizes[i + 1 :]:
                self.engine.extend(self.engine.new_cache(1, size), larger)


class Chat:
    """A conversation about one image, which is encoded once. answers: the answers so far, oldest first."""

    def __init__(self, mimo: Mimo, image: EncodedImage):
        self.mimo, self.image = mimo, image
        self.answers: list[Answer] = []
        self._past: list[TurnHistory] = []
        self._cache = TurnCache()

    def ask(self, question: str, **options: Any) -> Answer:
        """Ask the next question; see `request` for the other arguments. Raises UserError for an invalid request, which leaves the chat
        unchanged."""
        ((answer, past),) = self.mimo.generate([self.request(question, **options)])
        self._append_turn(answer, past)
        return answer

    def stream(self, question: str, **options: Any) -> Iterator[Event]:
        """Like `ask`, but yields the answer piece by piece. A stream that is not read to its end leaves the chat unchanged."""
        batch = self.mimo.start(self.request(question, **options))
        num_characters, num_entities = 0, 0
        while not batch.done:
            batch.decode(_NEXT_STEP if num_characters else _FIRST_STEP)
            text = batch.text(0)
            if len(text) > num_characters:
                yield Event(text=text[num_characters:])
                num_characters = len(text)
            for entity in batch.decode_masks()[0][num_entities:]:
                yield Event(entity=entity)
                num_entities += 1
        ((answer, past),) = self.mimo.finish(batch)
        self._append_turn(answer, past)
        yield Event(answer=answer)

    def request(
        self,
        question: str,
        points: Sequence[Sequence[float]] = (),
        boxes: Sequence[Sequence[float]] = (),
        scribbles: Sequence[Sequence[Sequence[float]]] = (),
        prompts: Source | None = None,
        mask_threshold: float | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Request:
        """Make the request of the next turn.

        points [[x, y, label]] (1 inside, 0 outside), boxes [[x0, y0, x1, y1]] half-open, scribbles [[[x, y], …]], all in pixels of the
        image, with integers at pixel centres; prompts: additional ones, as a mask bool [H, W], a file or parsed JSON, and mask_threshold,
        see `read_prompts`; max_new_tokens: maximum length of the answer; temperature, top_p, seed and stop: see `Sampling`."""
        own_prompts = Prompts(points, boxes, scribbles)
        if prompts is not None:
            height, width = self.image.pixels.shape[:2]
            others = read_prompts(prompts, height, width, mask_threshold=mask_threshold)
            own_prompts = join_prompts([read_prompts(own_prompts, height, width), others])
        sampling = Sampling(temperature, top_p, seed, (stop,) if isinstance(stop, str) else tuple(stop))
        return Request(self.image, question, own_prompts, max_new_tokens, self._past, sampling, self._cache)

    def _append_turn(self, answer: Answer, past: TurnHistory) -> None:
        self.answers.append(answer)
        self._past.append(past)


def read_image(image: str | os.PathLike | np.ndarray | MedicalImage, **chosen: Any) -> MedicalImage:
    """Open a file, or wrap uint8 pixels [H, W] or [H, W, 3], as a MedicalImage; a MedicalImage is returned as it is. chosen: frame, slice,
    series and window of a file, see `open_scan`. Raises UserError for other inputs, for a volume, and for `chosen` without a file."""
    if not isinstance(image, np.ndarray | MedicalImage):
        scan = open_scan(image, **chosen)
        if isinstance(scan, Volume):
            raise UserError(f"{image}: is a scan of {len(scan)} slices; choose one, such as slice {len(scan) // 2}, or see `ask_volume`")
        return scan
    for name, value in chosen.items():
        if value is not None:
            raise UserError(f"{name} {value}: applies only to a file, but pixels were given; omit it")
    if isinstance(image, MedicalImage):
        return image
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f"image: an array {image.dtype}{list(image.shape)}; give uint8 [height, width, 3] or [height, width]")
    return MedicalImage(image)
