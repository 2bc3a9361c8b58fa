"""`make demo`: ask the models that are there about phantoms and real images, fine-tune the tiny one on images of another look, and show
it all on one page, runs/demo/demo.html.

Every command is printed before it runs. The same command goes on where a stopped demo ended.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom.data
from demo_page import Figure, Section, write_page
from demo_steps import mimo, questions
from PIL import Image

from mimo_jax.checkpoints import named
from mimo_jax.data.records import RecordFolder

ROOT = Path("runs/demo")
PHANTOMS, INVERTED, PAGE = ROOT / "phantom", ROOT / "inverted", ROOT / "demo.html"
STEPS = 150  # of the fine-tuning: about a minute
SAMPLES = 60  # of an evaluation
# Files that pydicom brings along, and what they show.
REAL = {
    "CT_small.dcm": "CT, a vertebra and the aorta",
    "MR_small.dcm": "MR, a small slice",
    "examples_overlay.dcm": "MR, a slice of a scan",
    "examples_rgb_color.dcm": "ultrasound with colour Doppler",
}


def main() -> int:
    started = time.monotonic()
    ROOT.mkdir(parents=True, exist_ok=True)
    if not PHANTOMS.exists():
        mimo("data", "phantom", "--out", PHANTOMS, "--images", 300, "--seed", 7)
    sections = [ask("tiny", "phantoms", phantom_requests()), ask("tiny", "real", real_requests())]
    if "lite" in named.available() and fetched("lite"):
        sections.append(ask("lite", "real", real_requests()))
    sections.append(fine_tune())
    tries = next_commands()
    write_page(PAGE, sections, tries)
    print(f"\n{time.monotonic() - started:.0f} s. The pictures: {PAGE.resolve()}\n\nWhat to type next:", *tries, sep="\n  ")
    return 0


def fetched(name: str) -> bool:
    """Fetch a named model; False, with the reason printed, if that is not possible."""
    print(f"\n$ mimo fetch {name}", flush=True)
    code = subprocess.run([sys.executable, "-m", "mimo_jax.cli", "fetch", name]).returncode
    if code:
        print(f"{name} is not to be had now, for the reason above; the tiny model is shown alone")
    return code == 0


# --- questions


def phantom_requests() -> Iterator[tuple[dict, str]]:
    """(request, caption) of four phantoms that the tiny model was not trained on, one per perspective."""
    (ROOT / "images").mkdir(exist_ok=True)
    for image, question, boxes in questions(PHANTOMS, ROOT / "images"):
        marked = [[float(value) for value in flag.removeprefix("--box=").split(",")] for flag in boxes]
        caption = f"A phantom{', with a box around what is meant' if boxes else ''}"
        yield {"id": image.stem, "image": str(image.resolve()), "question": question, "boxes": marked}, caption


def real_requests() -> Iterator[tuple[dict, str]]:
    """(request, caption) of the real images."""
    for name, caption in REAL.items():
        path = pydicom.data.get_testdata_file(name, download=False)
        yield {"id": Path(name).stem, "image": str(path), "question": "What can be seen in this image?"}, caption


TITLES = {
    ("tiny", "phantoms"): (
        "The tiny model and phantoms",
        "The model that comes with this package (5 MB) was trained on drawn images, and these are new ones of the same kind.",
    ),
    ("tiny", "real"): (
        "The tiny model and real images",
        "It knows phantoms alone. What it says of a real image is of no use; the last line under a picture says so where it is noticed.",
    ),
    ("lite", "real"): (
        "The model lite and real images",
        "It was trained on real images; its model card says on which, and where it fails.",
    ),
}


def ask(model: str, about: str, requests: Iterator[tuple[dict, str]]) -> Section:
    """Ask a model one question per image; returns the pictures of its answers."""
    chosen = list(requests)
    source, out = ROOT / f"{about}.jsonl", ROOT / f"{model}_{about}"
    source.write_text("".join(json.dumps(request) + "\n" for request, _ in chosen), encoding="utf-8")
    mimo("batch", "--checkpoint", model, "--in", source, "--out", out, "--save", ".png", "--resume")
    answers = {row["id"]: row for row in map(json.loads, (out / "answers.jsonl").read_text(encoding="utf-8").splitlines())}
    figures = [Figure(out / f"{row['id']}.png", caption, row["question"], answers[row["id"]]["text"]) for row, caption in chosen]
    return Section(*TITLES[model, about], figures)


# --- fine-tuning


def fine_tune() -> Section:
    """Fine-tune the tiny model on phantoms with black and white exchanged, which it has never seen; returns pictures before and after."""
    manifest, run = INVERTED / "manifest.jsonl", ROOT / "finetuned"
    if not manifest.exists():
        write_inverted(manifest)
    reports = {}
    evaluate = ("--data", manifest, "--split", "test", "--limit", SAMPLES)
    for name, checkpoint in (("before", "tiny"), ("after", run)):
        if name == "after":
            short = (f"--config.train.steps={STEPS}", "--config.train.eval_samples=0", "--config.train.calibrate_samples=0")
            mimo("train", "--config", "configs/tiny_finetune.py", "--init", "tiny", "--data", manifest, "--workdir", run, *short)
        report, overlays = ROOT / f"{name}.json", ROOT / f"{name}_overlays"
        if not report.exists():
            mimo("eval", "--checkpoint", checkpoint, *evaluate, "--out", report, "--overlays", overlays)
        reports[name] = json.loads(report.read_text())["miou"]
    rows = "; ".join(f"{kind}: {reports['before'][kind]:.2f} → {reports['after'][kind]:.2f}" for kind in ("I", "II"))
    images = len(RecordFolder(PHANTOMS, "train"))
    text = (
        "Phantoms with black and white exchanged, as from another machine. Mean overlap (IoU) with the true masks on held-out images, "
        f"before and after {STEPS} steps on {images} images, of named structures (I) and pointed-at ones (II): {rows}."
    )
    pairs = list(zip(*(sorted((ROOT / f"{name}_overlays").glob("*.png"))[:3] for name in reports), strict=False))
    figures = [
        Figure(path, f"{name.capitalize()} fine-tuning: the model's answer and the true masks", "", "")
        for pair in pairs
        for name, path in zip(reports, pair, strict=True)
    ]
    return Section("One minute of fine-tuning", text, figures)


def write_inverted(manifest: Path) -> None:
    """Write the new phantoms with black and white exchanged, their masks, and a manifest of both, as somebody's own data would be."""
    (INVERTED / "files").mkdir(parents=True, exist_ok=True)
    lines = []
    for split in ("train", "val", "test"):
        records = RecordFolder(PHANTOMS, split)
        for record in (records[i] for i in range(len(records))):
            with Image.open(io.BytesIO(record.image)) as image:
                pixels = 255 - np.asarray(image.convert("L"))
            Image.fromarray(pixels).save(INVERTED / "files" / f"{record.id}.png")
            masks = []
            for mask in record.masks:
                name = f"files/{record.id}_{mask.mask_id}.png"
                Image.fromarray(mask.decode().astype(np.uint8) * 255).save(INVERTED / name)
                masks.append({"file": name, "entity": mask.entity})
            about = {"id": record.id, "image": f"files/{record.id}.png", "modality": record.modality, "group": record.group, "split": split}
            lines.append(about | {"width": record.width, "height": record.height, "masks": masks})
    part = manifest.with_suffix(".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    part.rename(manifest)


def next_commands() -> list[str]:
    """Commands to try, with files that are there."""
    image = next((ROOT / "images").glob("I_*"))
    commands = [f"source {os.path.relpath(Path(sys.prefix) / 'bin' / 'activate')}"]
    commands.append(
        shlex.join(["mimo", "ask", "--checkpoint", "tiny", str(image), "What is this?", "--point", "50,50,1", "--out", "answer.png"])
    )
    commands.append(shlex.join(["mimo", "chat", "--checkpoint", "tiny", str(image)]))
    commands.append("mimo train --config configs/tiny_finetune.py --init tiny --data my_data.jsonl --workdir runs/mine")
    return commands


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
