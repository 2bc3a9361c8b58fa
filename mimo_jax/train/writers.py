"""Write the metrics and images of a run to RUN/metrics.jsonl, to TensorBoard under RUN/tensorboard, and to W&B if
`config.train.wandb` names a project. Only process 0 writes."""

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


def check_writers(config: Config) -> None:
    """Raises ConfigError if a writer that the config asks for is not installed."""
    spec = importlib.util.find_spec("wandb") if config.train.wandb else None
    if config.train.wandb and (spec is None or spec.origin is None):  # without an origin it is ./wandb, the folder of W&B runs
        raise ConfigError("config.train.wandb: W&B is not installed; pip install 'mimo_jax[wandb]', or leave it empty")


class MetricWriters:
    """All writers of a run, as a context manager."""

    def __init__(self, config: Config, workdir: Path, first: int):
        """first: the step from which the run resumes; rows of later steps are removed, since these steps are repeated."""
        self.writers: list[Any] = []
        if jax.process_index() == 0:
            self.writers = [JsonlWriter(workdir, first), TensorBoardWriter(workdir, first)]
            if config.train.wandb:
                self.writers.append(WandbWriter(config, workdir))

    def write_scalars(self, step: int, row: dict[str, float | None]) -> None:
        for writer in self.writers:
            writer.write_scalars(step, row)

    def write_images(self, step: int, folder: Path) -> None:
        """Write the overlays of an evaluation, each under its file name; every evaluation uses the same samples."""
        for path in sorted(folder.glob("*.png")) if self.writers else ():
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            for writer in self.writers:
                writer.write_image(step, path.stem, pixels)

    def __enter__(self) -> MetricWriters:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_) -> None:
        for writer in self.writers:
            writer.close(failed is not None)


class JsonlWriter:
    """Writes metrics.jsonl."""

    def __init__(self, workdir: Path, first: int):
        truncate_rows(workdir / FILE, first)
        self.file = open(workdir / FILE, "a", buffering=1)

    def write_scalars(self, step: int, row: dict) -> None:
        self.file.write(json.dumps({"step": step, **row}) + "\n")

    def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        pass  # the images are already in RUN/eval

    def close(self, failed: bool) -> None:
        self.file.close()


def truncate_rows(path: Path, step: int) -> None:
    """Remove the rows after `step` and an incomplete last row; the old file is replaced once the new one is complete."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        with files.atomic_write(path) as part:
            part.write_text("".join(kept))


class TensorBoardWriter:
    """Writes to TensorBoard. tensorboardX imports torch if it is installed, so it is imported only when a run starts."""

    def __init__(self, workdir: Path, first: int):
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=first + 1)

    def write_scalars(self, step: int, row: dict) -> None:
        for name, value in row.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.writer.add_image(f"eval/{name}", pixels, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandbWriter:
    """Writes to W&B; RUN/wandb.json stores the id of the W&B run, so that a resumed run continues it."""

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
        self.run.define_metric("*", step_metric="step")  # otherwise W&B rejects repeated steps
        files.write_json(path, {"project": project, "id": name})

    def write_scalars(self, step: int, row: dict) -> None:
        self.run.log({"step": step, **{name: value for name, value in row.items() if value is not None}})

    def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.run.log({"step": step, f"eval/{name}": self.image(pixels)})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
