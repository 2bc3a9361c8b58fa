"""`mimo train`: from a config and a working directory to checkpoints, metrics, a report and overlays.

The same command goes on where a run stopped: parameters, optimizer, step and the data's position come
back, and the next step is bit-identical to what it would have been.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from tqdm import tqdm

from mimo_jax import distributed, files, pathtree, sharding
from mimo_jax.analysis import run_summary
from mimo_jax.checkpoints import arrays, checkpoint, frozen_params, loading
from mimo_jax.checkpoints.checkpoint import CheckpointError, Checkpoints
from mimo_jax.config import Config, ConfigError
from mimo_jax.data import conversation
from mimo_jax.data.loading import encode_features
from mimo_jax.data.loading.loader import Loader, make_loader
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mimo_jax.distributed import PreemptionGuard
from mimo_jax.errors import EXIT_OK, EXIT_TEMPFAIL
from mimo_jax.eval import calibrate, evaluate
from mimo_jax.eval.calibrate import UNCALIBRATED, Calibration
from mimo_jax.train import global_batch, writers
from mimo_jax.train.goodput import Goodput
from mimo_jax.train.guard import NonFiniteGuard
from mimo_jax.train.hooks import Periodic, Save, StepInfo
from mimo_jax.train.metrics import Metrics
from mimo_jax.train.state import TrainSetup
from mimo_jax.train.step import make_step
from mimo_jax.train.writers import MetricWriters


def train(config: Config, workdir: str | Path) -> int:
    """Train to `config.train.steps`; returns the exit code: 0 done, 75 stopped on request with the state saved. Of several processes
    (`distributed.run`) all call it.

    Raises UserError subclasses (exit 2) before any work for a config, data or checkpoint that cannot serve."""
    began = time.time()
    ready = prepare(config, workdir)
    run_summary.show(ready.plan, ready.sources, ready.checkpoints.workdir, ready.first)
    workdir, first, total = ready.checkpoints.workdir, ready.first, config.train.steps
    with Goodput(workdir, began, first, total, ready.restored) as goodput, MetricWriters(config, workdir, first) as told:
        code = _run(ready, goodput, told)
    print(goodput.summary())
    return code


class ResumedTraining(NamedTuple):
    """A run that the next step can be taken of. first: steps done; restored: seconds that it took to get back there, 0 for a new run."""

    plan: TrainSetup
    state: dict
    frozen: dict
    loader: Loader
    tokenizer: Tokenizer
    sources: dict
    checkpoints: Checkpoints
    first: int
    restored: float


def prepare(config: Config, workdir: str | Path) -> ResumedTraining:
    """Open the run in `workdir`, or begin it. UserErrors as in `train`."""
    config.validate()
    writers.check(config)
    workdir = Path(workdir)
    if not config.data.sources:
        raise ConfigError("config.data.sources: is empty; name a dataset with --data DIR")
    resumed = distributed.gather(checkpoint.open_run(workdir, config))[0]
    mesh = sharding.make_mesh(config.mesh)
    plan = TrainSetup(config, mesh)
    if config.data.features:
        encode_features.check_frozen(path for path in plan.multipliers if plan.trains(path))
    sources = open_sources(config, config.data.split)
    tokenizer = _tokenizer(config, workdir, sources)
    loader = make_loader(config, tokenizer, sources, global_batch.images_here(mesh, config.images()))
    checkpoints = Checkpoints(workdir, config.train.keep_last, config.train.keep_every)

    since = time.perf_counter()
    state, frozen = _restore(plan, checkpoints, loader) if resumed else (None, None)
    begun = state is not None
    restored = time.perf_counter() - since if begun else 0.0
    if not begun:
        state, frozen = plan.start(_initial_params(plan))
    if config.data.features:
        loader.use_features(encode_features.fingerprint(config, pathtree.flatten(frozen)))
    if not begun:
        checkpoint.start_run(workdir, config, frozen)
    return ResumedTraining(plan, state, frozen, loader, tokenizer, sources, checkpoints, _steps_done(loader), restored)


def _run(ready: ResumedTraining, goodput: Goodput, told: MetricWriters) -> int:
    """Every step that is left, and what follows the last; returns the exit code."""
    plan, frozen, loader, workdir = ready.plan, ready.frozen, ready.loader, ready.checkpoints.workdir
    config = plan.config

    def judge(state: dict, work: Callable[[dict], None]) -> None:
        with goodput.during("evaluate"):
            _with_params(plan, state, frozen, work)

    def look(tick: StepInfo) -> None:
        judge(tick.state, lambda params: _evaluate(config, params, ready.tokenizer, workdir, tick.step, told))

    hooks = [
        NonFiniteGuard(config.train, ready.checkpoints, loader.records),
        Metrics(config, goodput, told),
        Save(ready.checkpoints, config.train.checkpoint_every, goodput),
        Periodic(config.train.eval_every, look),
    ]
    stop = PreemptionGuard()
    tick = None
    try:
        for tick in steps(plan, ready.state, frozen, loader, stop, config.train.steps):
            for hook in hooks:
                hook(tick)
    finally:
        distributed.send_heartbeat(0)
        stop.restore()
        for hook in hooks:
            hook.close()
        loader.close()
    _write_bad(workdir / "bad_samples.jsonl", loader.bad)
    done = _steps_done(loader)
    if done < config.train.steps:
        print(f"stopped at step {done}, state saved; run the same command to go on", file=sys.stderr)
        return EXIT_TEMPFAIL
    if tick is not None:
        judge(tick.state, lambda params: _finish(config, params, ready.tokenizer, workdir, done, told))
    return EXIT_OK


def steps(plan: TrainSetup, state: dict, frozen: dict, loader: Loader, stop: PreemptionGuard, total: int) -> Iterator[StepInfo]:
    """One Tick a step, until `total` are done, or a stop signal. A step takes one batch, whether it moves the state or is skipped."""
    config = plan.config
    step_fn = make_step(plan)
    images = config.images()
    here = global_batch.images_here(plan.mesh, images)
    done = _steps_done(loader)
    batches, compiled = iter(loader), set()
    while done < total:
        distributed.send_heartbeat(config.train.step_timeout)
        since = time.perf_counter()
        batch = next(batches)
        position = loader.state()
        wait = time.perf_counter() - since
        placed = global_batch.place(plan.mesh, images, here, batch)
        length = batch["input_ids"].shape[1]
        handed = time.perf_counter()
        if length not in compiled:
            program = step_fn.lower(state, frozen, placed).compile()
            tqdm.write(run_summary.program(program, length, time.perf_counter() - handed))
            distributed.gather(None)  # a collective waits half a minute for peers, and they may compile for longer
            compiled.add(length)
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            state, metrics = step_fn(state, frozen, placed)
        dispatch = time.perf_counter() - handed
        done += 1
        last = done == total or stop.after(done)
        yield StepInfo(done, state, metrics, config.data.batch_size, last, lambda position=position: position, length, wait, dispatch)
        if last:
            return


def _steps_done(loader: Loader) -> int:
    return loader.state()["batch"]


def _tokenizer(config: Config, workdir: Path, sources: dict) -> Tokenizer:
    """The run's own, else that of `init.path`, else the configured file, else one learnt from the corpus; kept in the run."""
    path = workdir / "tokenizer.json"
    if jax.process_index() == 0 and not path.exists():
        with files.atomic_write(path) as part:
            if config.init.path:
                shutil.copy(checkpoint.tokenizer_path(config.init.path), part)
            elif config.tokenizer == "train":
                train_tokenizer(_corpus(config, sources), config.model.llm.vocab_size, part, config.model.grounding_tokens())
            elif config.tokenizer:
                if not Path(config.tokenizer).is_file():
                    raise ConfigError(f"config.tokenizer: no file {config.tokenizer}")
                shutil.copy(config.tokenizer, part)
            else:
                raise ConfigError('config.tokenizer: is empty; give a tokenizer.json, or "train" to learn one from the data')
    distributed.gather(None)
    return load_tokenizer(path, config.model)


def _corpus(config: Config, sources: dict) -> Iterator[str]:
    """Every conversation of the training data as the template words it, without reading an image."""
    for source in sources.values():
        for index in range(len(source)):
            for sample in source.samples(index):
                yield conversation.template_text(config, [turn.text for turn in sample.turns])


def _initial_params(plan: TrainSetup) -> dict:
    """From `init.path` where it is set, else from the seed. Parameters that the source lacks must be matched by `init.reinit`."""
    config = plan.config
    key = jax.random.key(config.train.seed)
    if not config.init.path:
        return plan.initial_params(key)
    wanted, places = pathtree.flatten(plan.params), pathtree.flatten(plan.param_shardings)

    def fits(path: str, leaf) -> bool:
        return path in wanted and wanted[path].shape == leaf.shape

    def place(abstract: dict) -> dict:  # straight to where it will live
        elsewhere = sharding.replicated(plan.mesh)
        flat = pathtree.flatten(abstract)
        return pathtree.unflatten({path: places[path] if fits(path, leaf) else elsewhere for path, leaf in flat.items()})

    source = pathtree.flatten(loading.load_params(config.init.path, place=place))
    absent = [path for path in wanted if path not in source or not fits(path, source[path])]
    refused = [p for p in absent if not (config.init.reinit and re.search(config.init.reinit, p))]
    if refused:
        raise CheckpointError(
            f"{config.init.path}: lacks, or has in another shape: {', '.join(refused)}; "
            "use its model config, or let config.init.reinit match them"
        )
    made = pathtree.flatten(plan.initial_params(key)) if absent else {}
    return pathtree.unflatten({p: made[p] if p in absent else source.pop(p).astype(leaf.dtype) for p, leaf in wanted.items()})


def _restore(plan: TrainSetup, checkpoints: Checkpoints, loader: Loader):
    """(state, frozen) of the newest whole step, with the loader set to its position; (None, None) if there is none."""
    step = checkpoints.latest()
    if step is None:
        return None, None
    state, position = checkpoints.restore(step, plan.state, plan.state_shardings)
    frozen = frozen_params.load(checkpoints.workdir, plan.frozen, plan.frozen_shardings)
    loader.restore(position)
    return state, frozen


def _with_params(plan: TrainSetup, state: dict, frozen: dict, work: Callable[[dict], None]) -> None:
    """`work` with all parameters: in process 0 alone, on its own devices, while the others wait."""
    distributed.send_heartbeat(0)
    mesh = sharding.inference_mesh(plan.config.model.llm)
    place = partial(sharding.param_shardings, mesh=mesh) if mesh else None
    params = arrays.on_first_process(pathtree.merge(state["params"], frozen), place)
    if params is not None:
        work(params)
    distributed.gather(None)


def _finish(config: Config, params: dict, tokenizer: Tokenizer, workdir: Path, step: int, told: MetricWriters) -> None:
    """Scores fitted on validation samples and kept with the last step, then an evaluation with them."""
    fitted = UNCALIBRATED
    if config.train.calibrate_samples:
        fitted = calibrate.calibrate_params(config, params, tokenizer)
        if fitted:
            fitted.write(checkpoint.calibration_path(workdir, step))
    if config.train.eval_samples:
        _evaluate(config, params, tokenizer, workdir, step, told, fitted)


def _evaluate(
    config: Config, params: dict, tokenizer: Tokenizer, workdir: Path, step: int, told: MetricWriters, fitted: Calibration = UNCALIBRATED
) -> None:
    """Free-running evaluation of `eval_samples` validation samples, and overlays of the first few, under `eval/<step>/`."""
    out = workdir / "eval" / f"{step:08d}"
    samples, overlays = config.train.eval_samples, config.train.num_overlays
    report = evaluate.evaluate_params(
        config, params, tokenizer, split="val", limit=samples, overlays=out, overlay_count=overlays, calibration=fitted
    )
    if report is not None:
        files.write_json(out / "report.json", report)
        told.pictures(step, out)


def _write_bad(path: Path, bad: list[dict]) -> None:
    """The samples that no process could use, if there are any."""
    rows = {row["sample"]: row for rows in distributed.gather(bad) for row in rows}
    if rows and jax.process_index() == 0:
        print(f"{len(rows)} samples could not be used; listed in {path}", file=sys.stderr)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
