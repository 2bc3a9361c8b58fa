"""Lists the samples that cannot be used, and stops a run that has too many of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

from mimo_jax import distributed
from mimo_jax.config import TrainConfig
from mimo_jax.data.loading.loader import Loader
from mimo_jax.data.records import DataError
from mimo_jax.train.hooks import StepInfo


class UnusableSamples:
    """The hook that counts the unusable samples of all processes every `train.log_every` steps. New ones are appended to `path`, one JSON
    object {"record", "sample", "reason"} per line. Raises DataError in every process once more than the fraction `train.max_bad_samples`
    of all samples of the data is unusable."""

    def __init__(self, config: TrainConfig, loader: Loader, path: Path):
        self.config, self.loader, self.path = config, loader, path
        self._reported = 0  # number of this process's samples that all processes know
        self._samples: set[str] = set()  # of all processes
        self._listed: set[str] = set()  # in the file, also by earlier starts of the run
        if path.exists() and jax.process_index() == 0:
            self._listed = {json.loads(line)["sample"] for line in path.read_text().splitlines()}

    def __call__(self, info: StepInfo) -> None:
        if info.step % self.config.log_every and not info.last:
            return
        own = self.loader.bad[self._reported :]
        self._reported += len(own)
        rows = {row["sample"]: row for rows in distributed.gather(own) for row in rows if row["sample"] not in self._samples}
        if not rows:
            return
        self._samples.update(rows)
        new = [row for name, row in rows.items() if name not in self._listed]
        if new and jax.process_index() == 0:
            with open(self.path, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in new))
        self._listed.update(rows)
        if len(self._samples) > self.config.max_bad_samples * self.loader.num_samples:
            shown = "; ".join(row["reason"] for row in list(rows.values())[:3])
            raise DataError(
                f"{len(self._samples)} of {self.loader.num_samples} samples are unusable, more than config.train.max_bad_samples "
                f"({self.config.max_bad_samples:g}), such as {shown}; repair those listed in {self.path}, or raise the bound"
            )

    def close(self) -> None:
        if self._samples:
            print(f"{len(self._samples)} samples could not be used; listed in {self.path}", file=sys.stderr)
