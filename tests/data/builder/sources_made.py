"""A manifest of small images without near-duplicates, and builds of it in a separate process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

BATCH_SIZE = 4  # items of a batch, so that small sources have several


def picture(number: int) -> np.ndarray:
    """uint8 [48, 64], smooth, and unlike that of any other number."""
    rough = np.random.default_rng(number).integers(0, 256, (6, 8), np.uint8)
    return np.asarray(Image.fromarray(rough).resize((64, 48), Image.Resampling.BICUBIC))


def write_source(folder: Path, count: int = 12, pictures=None, **changes) -> Path:
    """A manifest of `count` images of two a case, with a liver and a spleen each; pictures: number -> its picture's number;
    changes: line number as "line3" -> dict to lay over it."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number in range(count):
        masks = []
        for entity, left in (("liver", 4), ("spleen", 40)):
            mask = np.zeros((48, 64), np.uint8)
            mask[8 : 20 + number % 9, left : left + 14] = 255
            Image.fromarray(mask).save(folder / f"images/{number}_{entity}.png")
            masks.append({"file": f"images/{number}_{entity}.png", "entity": entity})
        Image.fromarray(picture((pictures or {}).get(number, number))).save(folder / f"images/{number}.png")
        line = {"id": f"n{number}", "image": f"images/{number}.png", "masks": masks, "modality": "CT", "group": f"case{number // 2}"}
        lines.append(line | {"dataset": "mine", "licence": "CC0-1.0"} | changes.get(f"line{number}", {}))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def command(source: Path, out: Path, *flags: str, before: str = "") -> list[str]:
    """A `mimo data build` with batches of BATCH_SIZE items. before: code that runs first, in the same process."""
    words = ["data", "build", "--source", "manifest", "--in", str(source), "--out", str(out), "--workers", "1", *flags]
    code = [
        "import sys",
        "from mimo_jax.cli.main import main",
        "from mimo_jax.data.builder import item_batches",
        f"item_batches.BATCH_SIZE = {BATCH_SIZE}",
        before,
    ]
    return [sys.executable, "-c", "\n".join([*code, f"sys.exit(main({words!r}))"])]


def run(*args, **options) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command(*args, **options), env=env, capture_output=True, text=True, timeout=120)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
