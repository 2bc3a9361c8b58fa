"""`make demo`: generate phantoms, train a tiny model on them, evaluate it and ask a few questions, in runs/demo.

Every command is printed before it runs. Finished steps are skipped; a stopped training run resumes.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from mimo_jax.data.records import RecordFolder

ROOT = Path("runs/demo")
DATA, RUN, REPORT, OVERLAYS, IMAGES, ANSWERS = (ROOT / n for n in ("phantom", "run", "report.json", "overlays", "images", "answers"))


def main() -> int:
    if not DATA.exists():
        mimo("data", "phantom", "--out", DATA, "--images", 6000, "--seed", 0)
    mimo("train", "--config", "configs/tiny.py", "--data", DATA, "--workdir", RUN)
    mimo("eval", "--checkpoint", RUN, "--data", DATA, "--split", "test", "--out", REPORT, "--overlays", OVERLAYS)
    IMAGES.mkdir(exist_ok=True)
    ANSWERS.mkdir(exist_ok=True)
    examples = questions()
    for image, question, prompt in examples:
        mimo("ask", "--checkpoint", RUN, image, question, *prompt, "--out", ANSWERS / f"{image.stem}.png")
    print(f"\nReport: {REPORT}\nImages:", *sorted(ANSWERS.glob("*.png")), *sorted(OVERLAYS.glob("*.png")), sep="\n  ")
    image, question, prompt = examples[0]
    ask = shlex.join(["mimo", "ask", "--checkpoint", str(RUN), str(image), question, *prompt, "--out", "answer.png"])
    print(f"\nTry it yourself:\n  source {os.path.relpath(Path(sys.prefix) / 'bin' / 'activate')}\n  {ask}")
    return 0


def mimo(*arguments) -> None:
    """Run one `mimo` command; if it fails, exit with its exit code."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ mimo {shlex.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "mimo_jax.cli", *words]).returncode
    if code:
        sys.exit(code)


def questions() -> list[tuple[Path, str, list[str]]]:
    """Write the images of four held-out phantoms, one per perspective; returns (image file, question, prompt flags) for each."""
    records = RecordFolder(DATA, "test")
    found: dict[str, tuple[Path, str, list[str]]] = {}
    for index in range(len(records)):
        record = records[index]
        for sample in record.samples:
            if sample.perspective in ("vqa", *found) or any(target.absent for target in sample.targets):
                continue
            turn = sample.turns[0]
            boxes = [record.mask(mask_id).box_xyxy for mask_id in turn.prompted]
            image = IMAGES / f"{sample.perspective}_{record.id}.{record.format}"
            image.write_bytes(record.image)
            found[sample.perspective] = (image, turn.text, [f"--box={','.join(map(str, box))}" for box in boxes])
            break
        if len(found) == 4:
            break
    return [found[perspective] for perspective in sorted(found)]


if __name__ == "__main__":
    sys.exit(main())
