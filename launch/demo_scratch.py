"""`make demo-scratch`: generate phantoms, train a tiny model on them, evaluate it and ask a few questions, in runs/scratch.

Every command is printed before it runs. Finished steps are skipped; a stopped training run resumes.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from demo_steps import mimo, questions

ROOT = Path("runs/scratch")
DATA, RUN, REPORT, OVERLAYS, IMAGES, ANSWERS = (ROOT / n for n in ("phantom", "run", "report.json", "overlays", "images", "answers"))


def main() -> int:
    if not DATA.exists():
        mimo("data", "phantom", "--out", DATA, "--images", 6000, "--seed", 0)
    mimo("train", "--config", "configs/tiny.py", "--data", DATA, "--workdir", RUN)
    mimo("eval", "--checkpoint", RUN, "--data", DATA, "--split", "test", "--out", REPORT, "--overlays", OVERLAYS)
    IMAGES.mkdir(exist_ok=True)
    ANSWERS.mkdir(exist_ok=True)
    examples = questions(DATA, IMAGES)
    for image, question, prompt in examples:
        mimo("ask", "--checkpoint", RUN, image, question, *prompt, "--out", ANSWERS / f"{image.stem}.png")
    print(f"\nReport: {REPORT}\nImages:", *sorted(ANSWERS.glob("*.png")), *sorted(OVERLAYS.glob("*.png")), sep="\n  ")
    image, question, prompt = examples[0]
    ask = shlex.join(["mimo", "ask", "--checkpoint", str(RUN), str(image), question, *prompt, "--out", "answer.png"])
    print(f"\nTry it yourself:\n  source {os.path.relpath(Path(sys.prefix) / 'bin' / 'activate')}\n  {ask}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
