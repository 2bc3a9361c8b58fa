"""What `make demo` and `make demo-scratch` have in common."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from mimo_jax.data.records import RecordFolder


def mimo(*arguments) -> None:
    """Run one `mimo` command; if it fails, exit with its exit code."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ mimo {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "mimo_jax.cli", *words]).returncode
    if code:
        sys.exit(code)


def questions(data: Path, images: Path) -> list[tuple[Path, str, list[str]]]:
    """Write the images of four held-out phantoms of `data` to `images`, one per perspective; returns (image file, question, prompt flags)
    for each."""
    records = RecordFolder(data, "test")
    found: dict[str, tuple[Path, str, list[str]]] = {}
    for index in range(len(records)):
        record = records[index]
        for sample in record.samples:
            if sample.perspective in ("vqa", *found) or any(target.absent for target in sample.targets):
                continue
            turn = sample.turns[0]
            boxes = [record.mask(mask_id).box_xyxy for mask_id in turn.prompted]
            image = images / f"{sample.perspective}_{record.id}.{record.format}"
            image.write_bytes(record.image)
            found[sample.perspective] = (image, turn.text, [f"--box={','.join(map(str, box))}" for box in boxes])
            break
        if len(found) == 4:
            break
    return [found[perspective] for perspective in sorted(found)]
