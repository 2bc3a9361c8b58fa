"""`mimo data build` on a synthetic tree in the layout of SA-Med2D: images per second, total peak memory of its processes, and
whether the bytes are the same for any number of workers and after a kill.

    python benchmarks/data_build.py [--images 20000] [--workers 1,2,4] [--folder DIR]

An image has 512x512 pixels and four masks; a case has ten images. The tree (about 3 GB for 20,000 images) and three datasets of the same
size are written to a temporary folder (in DIR), which is removed at the end.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

SIDE = 512
CLASSES = {"liver": 0, "spleen": 1, "left kidney": 2, "right kidney": 3}
_PAGE = resource.getpagesize()


def draw(root: Path, number: int) -> tuple[str, list[str]]:
    """Write one image and its masks: a random smooth body with noise and four ellipses. Returns their names in the tree."""
    rng = np.random.default_rng(number)
    smooth = Image.fromarray(rng.integers(40, 160, (12, 12)).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    inside = ((x - 256) / 230) ** 2 + ((y - 256) / 190) ** 2 < 1
    values = np.where(inside, np.asarray(smooth, np.float32) + rng.normal(0, 6, (SIDE, SIDE)), 0)
    stem = f"ct_00--Synthetic--case{number // 10:05d}--z_{number % 10:04d}"
    names = []
    for label, (cx, cy) in enumerate(((180, 230), (340, 230), (190, 340), (330, 340))):
        cx, cy, rx, ry = np.array([cx, cy, 50, 45]) + rng.integers(-15, 16, 4)
        mask = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
        values[mask] += 15 * (label + 1)
        names.append(f"masks/{stem}--{label:04d}_000.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(root / names[-1])
    Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).save(root / f"images/{stem}.png", compress_level=1)
    return f"images/{stem}.png", names


def make_tree(root: Path, images: int) -> None:
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    with multiprocessing.get_context("spawn").Pool() as pool:
        index = dict(pool.imap(functools.partial(draw, root), range(images), chunksize=32))
    (root / "SAMed2D_v1.json").write_text(json.dumps(index))
    (root / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps({"Synthetic": CLASSES}))


def build(root: Path, out: Path, workers: int, stop: Callable[[], bool] = lambda: False) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak resident memory of all processes in MiB). The build is killed as soon as `stop()` is true."""
    command = [sys.executable, "-m", "mimo_jax.cli", "data", "build", "--source", "sa-med2d", "--in", str(root), "--out", str(out)]
    start, used, peak = time.perf_counter(), cpu(), 0
    with open(out.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([*command, "--workers", str(workers)], stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, sum(map(resident, family(process.pid))))
            if stop():
                process.send_signal(signal.SIGKILL)
                process.wait()
                return time.perf_counter() - start, cpu() - used, peak / 2**20
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"the build ended with {process.returncode}:\n{out.with_suffix('.log').read_text()[-2000:]}")
    return time.perf_counter() - start, cpu() - used, peak / 2**20


def cpu() -> float:
    """CPU seconds of all child processes that have ended."""
    times = resource.getrusage(resource.RUSAGE_CHILDREN)
    return times.ru_utime + times.ru_stime


def family(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from family(int(child))


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def digest(folder: Path) -> str:
    hasher = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            hasher.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return hasher.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--folder")
    args = parser.parse_args()
    counts = [int(n) for n in args.workers.split(",")]
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        root, first = Path(scratch) / "SAMed2Dv1", ""
        make_tree(root, args.images)
        size = sum(entry.stat().st_size for name in ("images", "masks") for entry in os.scandir(root / name))
        print(f"{args.images} images, {4 * args.images} masks, {size / 2**20:.0f} MiB; load average {os.getloadavg()[0]:.1f}\n")
        print("| workers | images/s | CPU ms per image | peak memory, MiB | bytes |\n|---|---|---|---|---|")
        for workers in counts:
            out = Path(scratch) / f"with_{workers}"
            seconds, used, peak = build(root, out, workers)
            found, first = digest(out), first or digest(out)
            same = "the same" if found == first else "DIFFER"
            print(f"| {workers} | {args.images / seconds:.0f} | {1000 * used / args.images:.1f} | {peak:.0f} | {same} |", flush=True)
            shutil.rmtree(out)
        out, most = Path(scratch) / "killed", args.images // 256 // 3
        batches = out.parent / ".killed.building" / "batches"
        build(root, out, counts[-1], lambda: batches.is_dir() and len(list(batches.glob("*.summary"))) >= max(1, most))
        kept = len(list(batches.glob("*.summary")))
        build(root, out, counts[-1])
        same = "the same" if digest(out) == first else "DIFFER"
        print(f"\nkilled after {kept} batches of 256 images, then resumed: bytes {same}")


if __name__ == "__main__":
    main()
