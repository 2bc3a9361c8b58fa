"""Where rows of figures and pictures of a run go: RUN/metrics.jsonl always, TensorBoard under RUN/tensorboard, and W&B where
`config.train.wandb` names a project. Process 0 alone writes."""

from __future__ import annotations

import importlib.util
import json
import secrets
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from mimo_jax import files
from mimo_jax.config import Config, ConfigError

FILE = "metrics.jsonl"


def check(config: Config) -> None:
    """ConfigError if what a run is to report to is not there; before any work."""
    found = importlib.util.find_spec("wandb") if config.train.wandb else None
    if config.train.wandb and (found is None or found.origin is None):  # a folder of its runs, ./wandb, is no library
        raise ConfigError("config.train.wandb: W&B is not installed; pip install 'mimo_jax[wandb]', or leave it empty")


class MetricWriters:
    """All that a run reports to, while it holds."""

    def __init__(self, config: Config, workdir: Path, first: int):
        """first: the step at which the run goes on; rows beyond it are of steps that will be done again, and go."""
        self.places: list[Any] = []
        if jax.process_index() == 0:
            self.places = [JsonlWriter(workdir, first), TensorBoardWriter(workdir, first)]
            if config.train.wandb:
                self.places.append(_Wandb(config, workdir))

    def row(self, step: int, row: dict[str, float | None]) -> None:
        for place in self.places:
            place.row(step, row)

    def pictures(self, step: int, folder: Path) -> None:
        """The overlays that an evaluation wrote; they are of the same samples every time, each under its name."""
        for path in sorted(folder.glob("*.png")) if self.places else ():
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            for place in self.places:
                place.picture(step, path.stem, pixels)

    def __enter__(self) -> MetricWriters:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_) -> None:
        for place in self.places:
            place.close(failed is not None)


class JsonlWriter:
    """metrics.jsonl."""

    def __init__(self, workdir: Path, first: int):
        cut_rows(workdir / FILE, first)
        self.file = open(workdir / FILE, "a", buffering=1)

    def row(self, step: int, row: dict) -> None:
        self.file.write(json.dumps({"step": step, **row}) + "\n")

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        pass  # they lie in RUN/eval

    def close(self, failed: bool) -> None:
        self.file.close()


def cut_rows(path: Path, step: int) -> None:
    """Take away rows beyond `step`, and one that a kill cut short; the old file stands until the new one is whole."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        with files.atomic_write(path) as part:
            part.write_text("".join(kept))


class TensorBoardWriter:
    """TensorBoard, by tensorboardX, which imports torch wherever torch is installed: hence not before a run begins."""

    def __init__(self, workdir: Path, first: int):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=first + 1)

    def row(self, step: int, row: dict) -> None:
        for name, value in row.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.writer.add_image(f"eval/{name}", pixels, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self.writer.close()


class _Wandb:
    """W&B; RUN/wandb.json remembers which of its runs this is, so that a resumed one goes on there."""

    def __init__(self, config: Config, workdir: Path):
        import wandb

        project, path = config.train.wandb, workdir / "wandb.json"
        known = files.read_json(path) or {}
        name = known["id"] if known.get("project") == project else secrets.token_hex(4)
        try:
            self.run = wandb.init(
                project=project, id=name, resume="allow", name=workdir.name, dir=str(workdir), config=config.to_dict()
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise ConfigError(f"config.train.wandb: {error}; run `wandb login`, set WANDB_MODE=offline, or leave it empty") from error
        self.image = wandb.Image
        self.run.define_metric("*", step_metric="step")  # steps that are done again are not refused
        files.write_json(path, {"project": project, "id": name})

    def row(self, step: int, row: dict) -> None:
        self.run.log({"step": step, **{name: value for name, value in row.items() if value is not None}})

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.run.log({"step": step, f"eval/{name}": self.image(pixels)})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
