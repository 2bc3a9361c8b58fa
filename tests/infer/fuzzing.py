"""Requests as nobody means them: images, questions, marks and settings of every kind, sound and unsound."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from mimo_jax.errors import UserError
from mimo_jax.infer.predictor import Chat, Mimo

WORDS = [
    "What is this?",
    "Segment the liver.",
    "Is there a",
    "<SEG>",
    "</p>",
    "<image>",
    "ASSISTANT:",
    "</s>",
    "\0",
    "\ud800",
    "肝臓",
    "🫀",
    "\n",
    "  ",
]
NUMBERS = [0, 1, -1, 3.5, 7, 39, 55, 1e9, -1e300, float("nan"), float("inf"), True, None, "4", [], [2], {}, 2**70]
SECONDS = 30.0  # after which an answer counts as hanging


def image(rng: np.random.Generator, folder: Path):
    """An array, or a file, whole, cut, changed or none at all."""
    height, width = (int(n) for n in rng.choice([1, 2, 7, 40, 57, 300, 1500], 2, p=[0.1, 0.1, 0.2, 0.25, 0.25, 0.08, 0.02]))
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    kind = rng.integers(12)
    if kind < 5:
        return pixels
    if kind == 5:
        return pixels[..., 0]
    if kind == 6:
        odd = [pixels.astype(float), pixels[:0], pixels[None], pixels[..., :2], np.zeros((0, 0, 3), np.uint8), pixels.astype(np.uint16)]
        return odd[rng.integers(len(odd))]
    stream = io.BytesIO()
    Image.fromarray(pixels if kind != 8 else pixels[..., 0]).save(stream, str(rng.choice(["PNG", "JPEG", "TIFF", "BMP"])))
    data = bytearray(stream.getvalue())
    if kind == 9:
        data = data[: rng.integers(len(data))]
    elif kind == 10:
        for at in rng.integers(0, len(data), 5):
            data[at] = rng.integers(256)
    elif kind == 11:
        data = bytearray(rng.bytes(200)) if rng.random() < 0.5 else bytearray(128) + b"DICM" + rng.bytes(80)
    path = folder / "any"
    path.write_bytes(bytes(data))
    return path if rng.random() > 0.02 else folder / "gone.png"


def question(rng: np.random.Generator):
    if rng.random() < 0.7:
        return WORDS[rng.integers(3)]
    if rng.random() < 0.1:
        return [None, 3, "", " ", b"What?", "What is this? " * 500][rng.integers(6)]
    return "".join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(1, 8)))


def place(rng: np.random.Generator, height: int, width: int) -> list:
    """x and y, nearly always numbers, nearly always in the image."""
    made: list = [float(rng.uniform(-0.5, side - 0.5)) for side in (width, height)]
    if rng.random() < 0.03:
        made[rng.integers(2)] = NUMBERS[rng.integers(len(NUMBERS))]
    return made if rng.random() < 0.98 else made[:1]


def marks(rng: np.random.Generator, height: int, width: int) -> dict:
    """Some of points, boxes, scribbles and prompts, in bounds or not."""
    made: dict = {}
    if rng.random() < 0.3:
        made["points"] = [[*place(rng, height, width), int(rng.integers(2))] for _ in range(rng.integers(1, 4))]
    if rng.random() < 0.3:
        (x0, y0), (x1, y1) = rng.uniform(0, 0.5, 2), rng.uniform(0.5, 1, 2)
        box = [x0 * width, y0 * height, x1 * width, y1 * height]
        made["boxes"] = [box if rng.random() < 0.9 else [*place(rng, height, width), *place(rng, height, width)]]
    if rng.random() < 0.2:
        made["scribbles"] = [[place(rng, height, width) for _ in range(rng.integers(0, 30))]]
    if rng.random() < 0.03:
        made["points"] = NUMBERS[rng.integers(len(NUMBERS))]
    if rng.random() < 0.15:
        size = (height, width) if rng.random() < 0.7 else (40, 1)
        mask = rng.random(size) < rng.random() ** 2
        rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        rle = {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode()}
        if rng.random() < 0.3:
            rle["counts"] = rle["counts"][: rng.integers(len(rle["counts"]) + 1)] + "Z0"
        made["prompts"] = [mask, rle, {"masks": [rle]}, {"boxs": []}, json.dumps(rle).encode(), {"points": [[1, 1]]}][rng.integers(6)]
    return made


def settings(rng: np.random.Generator) -> dict:
    made: dict = {}
    if rng.random() < 0.3:
        made["max_new_tokens"] = [1, 5, 12, 24, 10**9, 0, -1, 2.5, "7"][rng.integers(5 if rng.random() < 0.8 else 9)]
    if rng.random() < 0.2:
        sound = rng.random() < 0.8
        made["temperature"] = [0.0, 0.7, 1.0, -1, float("nan"), "hot", None][rng.integers(3 if sound else 7)]
        made["top_p"] = [1.0, 0.5, 0.0, 2, float("nan")][rng.integers(2 if sound else 5)]
        made["seed"] = [0, 5, -3, 2**64, 1.5][rng.integers(2 if sound else 5)]
    if rng.random() < 0.2:
        made["stop"] = [["a"], "e", ["the", "."], [""], [3], ["x"] * 20][rng.integers(3 if rng.random() < 0.8 else 6)]
    return made


class Fuzz:
    """Asks one thing after the other and counts what becomes of it. faults: whatever is neither an answer nor one clear line."""

    def __init__(self, mimo: Mimo, folder: Path, seed: int):
        self.mimo, self.folder, self.rng = mimo, folder, np.random.default_rng(seed)
        self.answers = self.refused = 0
        self.faults: list[str] = []
        self.slowest = 0.0
        self.chat: Chat | None = None

    def once(self) -> None:
        rng = self.rng
        asked, started = {}, time.perf_counter()
        try:
            if self.chat is None or rng.random() < 0.5:
                self.chat = None
                self.chat = self.mimo.open(image(rng, self.folder))
            asked = {"question": question(rng), **marks(rng, *self.chat.image.pixels.shape[:2]), **settings(rng)}
            if rng.random() < 0.1:
                *_, last = self.chat.stream(**asked)
                answer = last.answer
            else:
                answer = self.chat.ask(**asked)
            json.dumps(answer.to_json())
            self.answers += 1
        except UserError as error:
            self.refused += 1
            if not str(error).strip() or "\n" in str(error):
                self.faults.append(f"not one line: {error!r} for {asked}")
        except Exception as error:  # this is what is looked for
            self.faults.append(f"{type(error).__name__}: {error} for {asked}")
        taken = time.perf_counter() - started
        self.slowest = max(self.slowest, taken)
        if taken > SECONDS:
            self.faults.append(f"{taken:.0f} s for {asked}")
