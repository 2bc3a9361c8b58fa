"""Ask a trained model about images: `Mimo.load(path).open(image).ask("What is this?", boxes=[[10, 12, 40, 44]])`.

Axis letters: H, W height and width of the original image in pixels; Q, D tokens and width of one turn's X_q.

CLIP and SAM see an image once, whatever is asked of it. Earlier turns of a chat are never rewritten: their X_q, their tokens and
their keys and values stand, only the new turn is aligned and prefilled, and only its `<SEG>`s are painted.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mimo_jax.checkpoints import loading
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
from mimo_jax.infer.engine.compiled import Engine
from mimo_jax.infer.engine.decode_batch import DecodeBatch, bucket, cache_bucket, stacked
from mimo_jax.infer.engine.device_cache import DeviceCache
from mimo_jax.infer.engine.requests import EncodedImage, EncodedTurn, Request, Sampling, TurnCache, TurnHistory, prepare

_IMAGES = 4  # an image in the towers weighs about as much as so many answers
_FIRST, _NEXT = 1, 4  # tokens between two looks at a streamed answer
_PAINTED = (1, 2, 4)  # structures in an answer that a warmed-up model is ready for

_log = logging.getLogger("mimo_jax")  # shapes, counts and seconds only: no names, no words


@dataclass(frozen=True)
class Event:
    """A piece of a streamed answer, in the order of its coming: further `text` (the pieces together are the answer's text), or an
    `entity` just painted, or at the end the whole `answer`."""

    text: str = ""
    entity: Entity | None = None
    answer: Answer | None = None


class Mimo:
    """A model that answers. Not tied to one image; safe to share between chats, one request at a time."""

    def __init__(
        self,
        config: Config,
        params: dict,
        tokenizer: Tokenizer,
        origin: str = "",
        calibration: Calibration = UNCALIBRATED,
        calibration_path: Path | None = None,
    ):
        """origin: where the parameters come from, in one line; calibration_path: where the calibration of their step lies, or would."""
        self.config, self.tokenizer, self.origin = config, tokenizer, origin
        self.calibration, self.calibration_path = calibration, calibration_path
        self.engine = Engine(config, params, conversation.stop_id(tokenizer, config))
        self.store = DeviceCache(config.generate.cache_mb * 2**20)

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike,
        base: str | os.PathLike | None = None,
        allow_untrained: bool = False,
        quantization: str = "",
        warm_up: bool = False,
    ) -> Mimo:
        """From a run directory (its newest whole step), one step, or an import. `base`: where the frozen weights lie, if
        neither the recorded path nor one beside the checkpoint holds them. Raises UserError for what cannot be loaded, and,
        unless `allow_untrained`, for an import some of whose parameters no one has trained yet. quantization: "int8" or "int4" to hold
        the language model's matrices in integers, a half or a quarter of bf16. warm_up: see there. Several devices share the model."""
        config, params, tokenizer_path, _, origin, path = loading.load_for_inference(checkpoint, base, allow_untrained, quantization)
        mimo = cls(config, params, load_tokenizer(tokenizer_path, config.model), origin, Calibration.read(path), path)
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
        """A chat about one image: a file (PNG, JPEG, TIFF, DICOM, NIfTI, …), one slice of a folder of DICOM files, uint8 pixels
        [H, W] or [H, W, 3], or a Picture; frame (from 0), slice ("axial:30"), series and window ((low, high) or a name) choose of a
        file or folder, as `open_scan` takes them. UserError if unreadable."""
        (encoded,) = self.encode([read_image(image, frame=frame, slice=slice, series=series, window=window)])
        return Chat(self, encoded)

    def encode(self, images: Sequence[MedicalImage | np.ndarray]) -> list[EncodedImage]:
        """Both towers over pictures or uint8 images [H, W, 3], in batches."""
        pictures = [image if isinstance(image, MedicalImage) else MedicalImage(image) for image in images]
        encoded = [EncodedImage(picture, *self._frames(picture.pixels)) for picture in pictures]
        self._encode(encoded)
        self.store.keep(*encoded)
        return encoded

    def _encode(self, images: Sequence[EncodedImage]) -> None:
        size = 1 if len(images) == 1 else max(1, self.config.generate.batch_size // _IMAGES)
        for at in range(0, len(images), size):
            chunk = images[at : at + size]
            seen = [preprocess(image.pixels, self.config.model) for image in chunk]
            arrays = (stacked([v[name] for v in seen], size) for name in ("vision_image", "vision_size", "sam_image", "sam_size"))
            x_img, features = self.engine.encode(*arrays, len(chunk))
            for i, image in enumerate(chunk):
                image.x_img, image.features = x_img[i], features[i]

    def predict(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer to each request, in order, in batches of `config.generate.batch_size`. Requests that hold the same
        object as image share its encoding. Raises UserError, before anything runs, for a request that cannot be asked."""
        return [answer for answer, _ in self.converse(requests)]

    def check(self, request: Request) -> None:
        """Raises UserError for a request that cannot be asked."""
        self._prepare(request)

    def converse(self, requests: Sequence[Request]) -> list[tuple[Answer, TurnHistory]]:
        """`predict`, with what each request's chat needs for its next turn."""
        turns = [self._prepare(request) for request in requests]
        raw = {id(r.image): r.image for r in requests if not isinstance(r.image, EncodedImage)}
        encoded = dict(zip(raw, self.encode(list(raw.values())), strict=True))
        images = [encoded.get(id(r.image), r.image) for r in requests]
        results: list[tuple[Answer, TurnHistory] | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].past), len(turns[i].ids)))
        size = self._rows(len(requests))
        for at in range(0, len(order), size):
            rows = order[at : at + size]
            run = self._run([requests[i] for i in rows], [images[i] for i in rows], [turns[i] for i in rows])
            run.decode()
            for i, result in zip(rows, self.finish(run), strict=True):
                results[i] = result
        return results

    def start(self, request: Request) -> DecodeBatch:
        """A request on its way, for one who wants to see the answer come; hand it to `finish` when it is done."""
        image = request.image if isinstance(request.image, EncodedImage) else self.encode([request.image])[0]
        return self._run([request], [image], [self._prepare(request)])

    def _run(self, requests: Sequence[Request], images: Sequence[EncodedImage], turns: Sequence[EncodedTurn]) -> DecodeBatch:
        """A batch that has been prefilled, its images encoded again where the store let their features go."""
        self.started = time.perf_counter()
        self._encode([image for image in dict.fromkeys(images) if image.features is None])
        self.store.keep(*images)
        return DecodeBatch(self.engine, self.config, self.tokenizer, self.calibration, requests, images, turns, self._rows(len(requests)))

    def finish(self, run: DecodeBatch) -> list[tuple[Answer, TurnHistory]]:
        """Answers of a run that is done, and what their chats need for the next turn."""
        results = run.finish()
        self.store.keep(*run.images, *(request.cache for request in run.requests if request.cache))
        marked = sum(bool(turn.prompts) for turn in run.turns)
        shape = f"{len(run.turns)} questions ({marked} with prompts), {sum(map(len, run.said))} tokens"
        painted = sum(len(answer.entities) for answer, _ in results)
        _log.info("request %s: %s, %d masks, %.2f s", secrets.token_hex(4), shape, painted, time.perf_counter() - self.started)
        return results

    def _rows(self, count: int) -> int:
        """Rows of a batch: one, or the configured number, so that few shapes are compiled."""
        return 1 if count == 1 else self.config.generate.batch_size

    def _frames(self, pixels: np.ndarray) -> tuple[Frame, Frame]:
        m = self.config.model
        height, width = pixels.shape[:2]
        vision = vision_frame(height, width, m.vision.image_size, m.vision.image_fit)
        return vision, sam_frame(height, width, m.sam.image_size, m.sam.image_fit)

    def _prepare(self, request: Request) -> EncodedTurn:
        image = request.image
        if not isinstance(image, EncodedImage):
            pixels = image.pixels if isinstance(image, MedicalImage) else image
            return prepare(request, self._frames(pixels)[0], self.tokenizer, self.config)
        return prepare(request, image.vision_frame, self.tokenizer, self.config)

    def warm_up(self, progress: bool = False) -> None:
        """Compile all that a chat needs, so that no question waits for it: the encoders, every size of the cache with every length of
        a turn whose question the aligner reads in full, and answers of the usual length with up to 4 structures."""
        (image,) = self.encode([np.zeros((8, 8, 3), np.uint8)])
        queries, usual, most = self.config.model.query_tokens(), self.config.generate.max_new_tokens, self.config.model.llm.max_length
        shortest = len(conversation.encode_user_turn(self.tokenizer, self.config, "?", 1, False)[0])
        longest = len(conversation.encode_user_turn(self.tokenizer, self.config, "?", 0, True)[0]) + self.config.model.aligner.max_text
        lengths = sorted({bucket(n) for n in range(shortest, longest + 1)})
        sizes = sorted({cache_bucket(min(n + usual, most)) for n in range(shortest, most)})
        pairs = [(length, size) for size in sizes for length in lengths if length <= size]
        for length, size in tqdm(pairs, desc="compile", unit="shape", disable=None if progress else True):
            kept = max(0, size - length - usual)
            request = Request(
                image, "?", past=[TurnHistory([], [], None)] if kept else (), cache=TurnCache(self.engine.new_cache(1, size), kept)
            )
            first = queries if kept else 0
            turn = self._prepare(Request(image, "?"))
            turn.start, turn.limit = kept, 1
            turn.ids = [self.tokenizer.pad] * (kept + length)
            turn.query_index = [-1] * kept + [*range(first, first + queries), *[-1] * (length - queries)]
            run = self._run([request], [image], [turn])
            run.decode()
            self.finish(run)
        for count in _PAINTED:
            run.said, run.entities = [[self.tokenizer.seg] * count], [[]]
            run.decode_masks()
        for i, size in enumerate(sizes):
            for larger in sizes[i + 1 :]:
                self.engine.extend(self.engine.new_cache(1, size), larger)


class Chat:
    """Questions about one image, which is encoded once. `answers`: what was said so far, oldest first."""

    def __init__(self, mimo: Mimo, image: EncodedImage):
        self.mimo, self.image = mimo, image
        self.answers: list[Answer] = []
        self._past: list[TurnHistory] = []
        self._cache = TurnCache()

    def ask(self, question: str, **asked: Any) -> Answer:
        """The next turn; see `request` for what may stand beside the question. UserError for what cannot be asked; the chat then
        stands as it was."""
        ((answer, past),) = self.mimo.converse([self.request(question, **asked)])
        self._said(answer, past)
        return answer

    def stream(self, question: str, **asked: Any) -> Iterator[Event]:
        """`ask`, piece by piece. A stream that is left before its end leaves the chat as it was."""
        run = self.mimo.start(self.request(question, **asked))
        told, painted = 0, 0
        while not run.done:
            run.decode(_NEXT if told else _FIRST)
            text = run.text(0)
            if len(text) > told:
                yield Event(text=text[told:])
                told = len(text)
            for entity in run.decode_masks()[0][painted:]:
                yield Event(entity=entity)
                painted += 1
        ((answer, past),) = self.mimo.finish(run)
        self._said(answer, past)
        yield Event(answer=answer)

    def request(
        self,
        question: str,
        points: Sequence[Sequence[float]] = (),
        boxes: Sequence[Sequence[float]] = (),
        scribbles: Sequence[Sequence[Sequence[float]]] = (),
        prompts: Source | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Request:
        """points [[x, y, label]] (1 in, 0 out), boxes [[x0, y0, x1, y1]] half-open, scribbles [[[x, y], …]], all in pixels of the
        image, integers being pixel centres; prompts: further ones, a mask bool [H, W], a file or what JSON holds, as `read_prompts` takes
        them; max_new_tokens: longest answer; temperature, top_p, seed and stop as in `Sampling`."""
        marked = Prompts(points, boxes, scribbles)
        if prompts is not None:
            height, width = self.image.pixels.shape[:2]
            marked = join_prompts([read_prompts(marked, height, width), read_prompts(prompts, height, width)])
        sampling = Sampling(temperature, top_p, seed, (stop,) if isinstance(stop, str) else tuple(stop))
        return Request(self.image, question, marked, max_new_tokens, self._past, sampling, self._cache)

    def _said(self, answer: Answer, past: TurnHistory) -> None:
        self.answers.append(answer)
        self._past.append(past)


def read_image(image: str | os.PathLike | np.ndarray | MedicalImage, **chosen: Any) -> MedicalImage:
    """A file, or uint8 pixels [H, W] or [H, W, 3], as a Picture; one that is there already stays. chosen: frame, slice, series,
    window of a file, see `open_scan`. UserError for what is none of these, for a whole scan, and for `chosen` without a file."""
    if not isinstance(image, np.ndarray | MedicalImage):
        scan = open_scan(image, **chosen)
        if isinstance(scan, Volume):
            raise UserError(f"{image}: is a scan of {len(scan)} slices; choose one, such as slice {len(scan) // 2}, or see `ask_volume`")
        return scan
    for name, value in chosen.items():
        if value is not None:
            raise UserError(f"{name} {value}: is for a file; these are pixels already, leave it away")
    if isinstance(image, MedicalImage):
        return image
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f"image: an array {image.dtype}{list(image.shape)}; give uint8 [height, width, 3] or [height, width]")
    return MedicalImage(image)
