"""The evaluations of a run: every `train.eval_every` steps, and at the end, after a confidence calibration of the last step.

RUN/stages.json holds, for each of these stages, the step for which it was last completed. A run that was stopped or died within a stage
repeats that stage, and only that one, when the same command is given again.
"""

from __future__ import annotations

from functools import partial

import jax

from mimo_jax import distributed, files, pathtree, sharding
from mimo_jax.checkpoints import arrays, checkpoint
from mimo_jax.checkpoints.checkpoint import FAMILIARITY, Checkpoints
from mimo_jax.data.tokenizer import Tokenizer
from mimo_jax.distributed import PreemptionGuard
from mimo_jax.eval import calibrate, evaluate
from mimo_jax.eval.evaluate import EvaluationStopped
from mimo_jax.eval.familiarity import fit_params
from mimo_jax.infer.answers.calibration import UNCALIBRATED, Calibration
from mimo_jax.train.goodput import Goodput
from mimo_jax.train.state import TrainSetup
from mimo_jax.train.writers import MetricWriters

STAGES = "stages.json"
PERIODIC, CALIBRATION, FINAL = "evaluation", "calibration", "final evaluation"


class Evaluations:
    """Runs the stages that are due. If there are several processes, all must make the same calls; each answers its share of the questions
    on its own devices."""

    def __init__(
        self,
        setup: TrainSetup,
        frozen: dict,
        tokenizer: Tokenizer,
        checkpoints: Checkpoints,
        goodput: Goodput,
        writers: MetricWriters,
        stop: PreemptionGuard,
    ):
        self.setup, self.frozen, self.tokenizer, self.checkpoints = setup, frozen, tokenizer, checkpoints
        self.goodput, self.writers, self.stop = goodput, writers, stop
        self.config, self.path = setup.config, checkpoints.workdir / STAGES
        self._completed: dict[str, int] = distributed.gather(files.read_json(self.path) or {})[0]

    def at(self, step: int, state: dict) -> bool:
        """The evaluation during training, if it is due after this step; returns False if the run was asked to stop before its end."""
        every = self.config.train.eval_every
        due = bool(every) and step > 0 and step % every == 0 and self._completed.get(PERIODIC) != step
        return self._run(step, state, [PERIODIC] if due else [])

    def finish(self, step: int, state: dict) -> bool:
        """The calibration and the evaluation of the last step, as far as they are due; returns False as `at` does."""
        wanted = {CALIBRATION: self.config.train.calibrate_samples, FINAL: self.config.train.eval_samples}
        return self._run(step, state, [stage for stage, samples in wanted.items() if samples and self._completed.get(stage) != step])

    def _run(self, step: int, state: dict, stages: list[str]) -> bool:
        if not stages:
            return True
        with self.goodput.during("save"):
            self.checkpoints.wait()  # the step is complete before it is evaluated
        distributed.send_heartbeat(0)
        with self.goodput.during("evaluate"):
            params = self._local_params(state)
            try:
                for stage in stages:
                    self._run_stage(stage, step, params)
                    self._mark(stage, step)
            except EvaluationStopped:
                return False
        return True

    def _local_params(self, state: dict) -> dict:
        """All parameters on the devices of this process."""
        mesh = sharding.inference_mesh(self.config.model.llm)
        place = partial(sharding.param_shardings, mesh=mesh) if mesh else None
        return arrays.on_every_process(pathtree.merge(state["params"], self.frozen), place)

    def _run_stage(self, stage: str, step: int, params: dict) -> None:
        calibration_path = checkpoint.calibration_path(self.checkpoints.workdir, step)
        if stage == CALIBRATION:
            calibration = calibrate.calibrate_params(self.config, params, self.tokenizer, self.stop.requested)
            if calibration and jax.process_index() == 0:
                calibration.write(calibration_path)
            stopped = False
            if jax.process_index() == 0:
                try:
                    familiarity = fit_params(self.config, params, self.tokenizer, self.stop.requested)
                    if familiarity:
                        familiarity.write(calibration_path.with_name(FAMILIARITY))
                except EvaluationStopped:
                    stopped = True
            if distributed.gather(stopped)[0]:
                raise EvaluationStopped
            return
        calibration = Calibration.read(calibration_path) if stage == FINAL else UNCALIBRATED
        self._evaluate(step, params, calibration)

    def _evaluate(self, step: int, params: dict, calibration: Calibration) -> None:
        """Evaluate `eval_samples` validation samples by free-running generation; write the report and overlays to `eval/<step>/`."""
        out = self.checkpoints.workdir / "eval" / f"{step:08d}"
        samples, overlays = self.config.train.eval_samples, self.config.train.num_overlays
        report = evaluate.evaluate_params(
            self.config, params, self.tokenizer, "val", samples, out, overlays, calibration, self.stop.requested
        )  # fmt: skip
        if report is not None and jax.process_index() == 0:
            files.write_json(out / "report.json", report)
            self.writers.write_images(step, out)

    def _mark(self, stage: str, step: int) -> None:
        self._completed[stage] = step
        if jax.process_index() == 0:
            files.write_json(self.path, self._completed)
        distributed.gather(None)  # what process 0 has written, all can read
