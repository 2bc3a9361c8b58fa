"""The loader alone: samples per second at the sizes of the full model, without repeated images or cache hits.

    python benchmarks/loader.py [--sides 512,1024] [--formats png,jpeg] [--share 1,4] [--workers 2] [--seconds 10]

A record is a grey PNG or colour JPEG of a body with noise and four ellipses as masks. A sample segments one to four of them, and half of
the questions point at one with sampled prompts. Views are 1024² for SAM and 224² for CLIP, masks 256². The result is the median of five
runs, together with the CPU time of all processes per sample, which depends less on other jobs on the machine.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from configs import mimo_7b  # noqa: E402
from mimo_jax.config import PROMPTED, Config, SourceConfig  # noqa: E402
from mimo_jax.data.loading.loader import make_loader  # noqa: E402
from mimo_jax.data.loading.sources import open_sources  # noqa: E402
from mimo_jax.data.records import write_records  # noqa: E402
from mimo_jax.data.schema import Record, Sample, Target, Turn, encode_mask  # noqa: E402
from mimo_jax.data.tokenizer import Tokenizer, train_tokenizer  # noqa: E402

ENTITIES = ("liver", "spleen", "left kidney", "right kidney")
PLACES = ((0.35, 0.45), (0.66, 0.45), (0.37, 0.66), (0.64, 0.64))
QUESTION = "Which of the organs that can be seen in this picture filter blood or make bile?"


def make_image(number: int, side: int, kind: str) -> tuple[bytes, list[np.ndarray]]:
    """(bytes of the image file, masks)."""
    rng = np.random.default_rng(number)
    smooth = Image.fromarray(rng.integers(40, 160, (12, 12)).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    y, x = np.mgrid[:side, :side].astype(np.float32) / side
    body = ((x - 0.5) / 0.45) ** 2 + ((y - 0.5) / 0.37) ** 2 < 1
    values = np.where(body, np.asarray(smooth, np.float32) + rng.normal(0, 6, (side, side)), 0)
    masks = []
    for place, (cx, cy) in enumerate(np.array(PLACES) + rng.uniform(-0.03, 0.03, (4, 2))):
        masks.append(((x - cx) / 0.1) ** 2 + ((y - cy) / 0.09) ** 2 < 1 + 0.1 * np.sin(9 * np.arctan2(y - cy, x - cx)))
        values[masks[-1]] += 15 * (place + 1)
    image, file = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)), io.BytesIO()
    if kind == "jpeg":
        image.convert("RGB").save(file, "JPEG", quality=90)
    else:
        image.save(file, "PNG")
    return file.getvalue(), masks


def make_sample(name: str, perspective: str, number: int) -> Sample:
    if perspective == "vqa":
        return Sample(name, perspective, [Turn("user", "Is there a liver?"), Turn("assistant", "Yes.")])
    shown = ENTITIES[: 1 + number % 4]
    answer = " and ".join(f"the {entity}" for entity in shown) + " can be seen."
    targets = [Target(1, entity, [answer.index(entity), answer.index(entity) + len(entity)], [entity]) for entity in shown]
    pointed = [shown[0]] if perspective in PROMPTED else []
    return Sample(name, perspective, [Turn("user", QUESTION, pointed), Turn("assistant", answer)], targets)


def records(count: int, side: int, kind: str, share: int) -> Iterator[Record]:
    for number in range(count):
        image, masks = make_image(number, side, kind)
        asked = [(p, i) for p in ("vqa", "I", "II", "III", "IV") for i in range(share)]
        yield Record(
            id=f"r{number}", image=image, format=kind, height=side, width=side, modality="CT", dataset="made", split="train",
            group=f"g{number}", masks=[encode_mask(mask, entity, entity) for mask, entity in zip(masks, ENTITIES, strict=True)],
            samples=[make_sample(f"r{number}/{p}{i}", p, number + i) for p, i in asked],
        )  # fmt: skip


def config_for(folder: Path, share: int, workers: int) -> Config:
    config = mimo_7b.get_config()
    config.model.llm.vocab_size = 512
    config.data.sources = {"made": SourceConfig(path=str(folder))}
    config.data.batch_size, config.data.samples_per_image = 8, share
    config.data.workers, config.data.cache_mb = workers, 0
    config.validate()
    return config


def busy() -> float:
    """CPU seconds of this process and its workers."""
    ticks = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def rates(config: Config, tokenizer: Tokenizer, seconds: float, runs: int = 5) -> tuple[list[float], float]:
    """(samples per second of each run after the workers have started; CPU milliseconds per sample)."""
    loader = make_loader(config, tokenizer, open_sources(config, "train"))
    for _ in range(2 * max(1, config.data.workers)):
        next(loader)
    found, used, all_taken = [], busy(), 0
    for _ in range(runs):
        start, taken = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or taken % max(1, config.data.workers):
            next(loader)
            taken += 1
        found.append(taken * config.data.batch_size / (time.perf_counter() - start))
        all_taken += taken
    used = busy() - used
    loader.close()
    return found, 1000 * used / (all_taken * config.data.batch_size)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sides", default="512,1024")
    parser.add_argument("--formats", default="png,jpeg")
    parser.add_argument("--share", default="1,4", help="config.data.samples_per_image")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    print("| source | samples per image | samples/s, median of 5 | minimum | CPU ms per sample | load average |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        texts = [turn.text for p in ("vqa", "III") for i in range(4) for turn in make_sample("", p, i).turns]
        tokenizer = train_tokenizer(texts * 3, 512, Path(scratch) / "tokenizer.json")
        for kind in args.formats.split(","):
            for side in map(int, args.sides.split(",")):
                for share in map(int, args.share.split(",")):
                    folder = Path(scratch) / f"{kind}{side}x{share}"
                    write_records(folder, records(args.images, side, kind, share), {})
                    found, used = rates(config_for(folder, share, args.workers), tokenizer, args.seconds)
                    row = [f"{side}² {kind}", share, f"{statistics.median(found):.0f}", f"{min(found):.0f}", f"{used:.1f}"]
                    print(f"| {' | '.join(map(str, row))} | {os.getloadavg()[0]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
