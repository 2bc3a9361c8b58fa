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
from collections.abc import Iterator
from pathlib import Path

import jax

from mimo_jax import __version__, base, checkpoint, pathtree, sharding
from mimo_jax.checkpoint import CheckpointError, Checkpoints
from mimo_jax.config import Config, ConfigError
from mimo_jax.data import conversation
from mimo_jax.data.loader import Loader, make_loader
from mimo_jax.data.sources import open_sources
from mimo_jax.data.tokenizer import Tokenizer, train_tokenizer
from mimo_jax.eval import calibrate, evaluate
from mimo_jax.eval.calibrate import Calibration
from mimo_jax.stopping import StopSignal
from mimo_jax.train import encode
from mimo_jax.train.hooks import Every, Metrics, Save, Tick
from mimo_jax.train.state import Plan
from mimo_jax.train.step import make_step

EXIT_DONE, EXIT_STOPPED = 0, 75


def train(config: Config, workdir: str | Path) -> int:
    """Train to `config.train.steps`; returns the exit code: 0 done, 75 stopped on request with the state saved.

    Raises UserError subclasses (exit 2) before any work for a config, data or checkpoint that cannot serve."""
    config.validate()
    workdir = Path(workdir)
    if not config.data.sources:
        raise ConfigError("config.data.sources: is empty; name a dataset with --data DIR")
    resumed = checkpoint.open_run(workdir, config)
    mesh = sharding.make_mesh(config.mesh)
    plan = Plan(config, mesh)
    if config.data.features:
        encode.check_frozen(plan)
    sources = open_sources(config, config.data.split)
    tokenizer = _tokenizer(config, workdir, sources)
    loader = make_loader(config, tokenizer, sources, jax.process_index(), jax.process_count())
    checkpoints = Checkpoints(workdir, keep_last=config.train.keep_last)

    state, frozen = _restore(plan, checkpoints, loader) if resumed else (None, None)
    begun = state is not None
    if not begun:
        state, frozen = plan.start(_initial_params(plan))
    if config.data.features:
        loader.use_features(encode.fingerprint(config, pathtree.flatten(frozen)))
    if not begun:
        checkpoint.start_run(workdir, config, frozen)
    first = int(state["step"])
    _banner(config, plan, sources, workdir, first)

    metrics = Metrics(workdir, config.train.log_every, first, config.train.steps, checkpoints)
    save = Save(checkpoints, config.train.checkpoint_every, metrics)
    look = Every(config.train.eval_every, lambda tick: _evaluate(plan, tick.state, frozen, tokenizer, workdir, tick.step))
    hooks = [metrics, save, look]
    stop = StopSignal()
    tick = None
    try:
        for tick in steps(plan, state, frozen, loader, stop):
            for hook in hooks:
                hook(tick)
    finally:
        stop.restore()
        for hook in hooks:
            hook.close()
        loader.close()
    if tick is not None:
        state = tick.state
    if loader.bad:
        print(f"{len(loader.bad)} samples could not be used; listed in {workdir / 'bad_samples.jsonl'}", file=sys.stderr)
        _write_lines(workdir / "bad_samples.jsonl", loader.bad)
    done = int(state["step"])
    if done < config.train.steps:
        print(f"stopped at step {done}, state saved; run the same command to go on", file=sys.stderr)
        return EXIT_STOPPED
    if tick is not None:
        fitted = {}
        if config.train.calibrate_samples:
            fitted["calibration"] = _calibrate(plan, state, frozen, tokenizer, workdir, done)
        if config.train.eval_samples:
            _evaluate(plan, state, frozen, tokenizer, workdir, done, **fitted)
    return EXIT_DONE


def steps(plan: Plan, state: dict, frozen: dict, loader: Loader, stop: StopSignal) -> Iterator[Tick]:
    """One Tick a step, until `config.train.steps` or a stop signal."""
    step_fn = make_step(plan)
    batch_sharding = sharding.of_batch(plan.mesh)
    total = plan.config.train.steps
    done = int(state["step"])
    batches = iter(loader)
    while done < total:
        since = time.perf_counter()
        batch = next(batches)
        position = loader.state()
        wait = time.perf_counter() - since
        on_device = {name: jax.make_array_from_process_local_data(batch_sharding, value) for name, value in batch.items()}
        state, metrics = step_fn(state, frozen, on_device)
        done += 1
        last = done == total or stop.received
        yield Tick(done, state, metrics, plan.config.data.batch_size, last, lambda position=position: position, wait)
        if last:
            return


def _tokenizer(config: Config, workdir: Path, sources: dict) -> Tokenizer:
    """The run's own, else that of `init.path`, else the configured file, else one learnt from the corpus; kept in the run."""
    path = workdir / "tokenizer.json"
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        if config.init.path:
            shutil.copy(checkpoint.tokenizer_path(config.init.path), path)
        elif config.tokenizer == "train":
            train_tokenizer(_corpus(config, sources), config.model.llm.vocab_size, path, config.model.grounding_tokens())
        elif config.tokenizer:
            if not Path(config.tokenizer).is_file():
                raise ConfigError(f"config.tokenizer: no file {config.tokenizer}")
            shutil.copy(config.tokenizer, path)
        else:
            raise ConfigError('config.tokenizer: is empty; give a tokenizer.json, or "train" to learn one from the data')
    return Tokenizer(path, config.model)


def _corpus(config: Config, sources: dict) -> Iterator[str]:
    """Every conversation of the training data as the template words it, without reading an image."""
    for source in sources.values():
        for index in range(len(source)):
            for sample in source.samples(index):
                yield conversation.template_text(config, [turn.text for turn in sample.turns])


def _initial_params(plan: Plan) -> dict:
    """From `init.path` where it is set, else from the seed. Parameters that the source lacks must be matched by `init.fresh`."""
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

    source = pathtree.flatten(checkpoint.load_params(config.init.path, place=place))
    absent = [path for path in wanted if path not in source or not fits(path, source[path])]
    refused = [p for p in absent if not (config.init.fresh and re.search(config.init.fresh, p))]
    if refused:
        raise CheckpointError(
            f"{config.init.path}: lacks, or has in another shape: {', '.join(refused)}; "
            "use its model config, or let config.init.fresh match them"
        )
    made = pathtree.flatten(plan.initial_params(key)) if absent else {}
    return pathtree.unflatten({p: made[p] if p in absent else source.pop(p).astype(leaf.dtype) for p, leaf in wanted.items()})


def _restore(plan: Plan, checkpoints: Checkpoints, loader: Loader):
    """(state, frozen) of the newest whole step, with the loader set to its position; (None, None) if there is none."""
    step = checkpoints.latest()
    if step is None:
        return None, None
    state, position = checkpoints.restore(step, plan.state, plan.state_shardings)
    frozen = base.load(checkpoints.workdir, plan.frozen, plan.frozen_shardings)
    loader.restore(position)
    return state, frozen


def _calibrate(plan: Plan, state: dict, frozen: dict, tokenizer: Tokenizer, workdir: Path, step: int) -> Calibration:
    """Scores fitted on validation samples, kept with the last step."""
    made = calibrate.calibrate_params(plan.config, pathtree.merge(state["params"], frozen), tokenizer)
    if made and jax.process_index() == 0:
        made.write(checkpoint.calibration_path(workdir, step))
    return made


def _evaluate(plan: Plan, state: dict, frozen: dict, tokenizer: Tokenizer, workdir: Path, step: int, **fitted) -> None:
    """Free-running evaluation of `eval_samples` validation samples, and overlays of the first few, under `eval/<step>/`."""
    config = plan.config
    out = workdir / "eval" / f"{step:08d}"
    report = evaluate.evaluate_params(
        config,
        pathtree.merge(state["params"], frozen),
        tokenizer,
        split="val",
        limit=config.train.eval_samples,
        overlays=out,
        overlay_count=config.train.overlays,
        **fitted,
    )
    if report is not None:
        (out / "report.json").write_text(json.dumps(report, indent=1))


def _banner(config: Config, plan: Plan, sources: dict, workdir: Path, first: int) -> None:
    counts = plan.counts()
    images = ", ".join(f"{name} {len(source)}" for name, source in sources.items())
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh {dict(plan.mesh.shape)}"
    print(f"mimo_jax {__version__}, jax {jax.__version__}, {devices}")
    print(f"parameters: {counts['trained']:,} trained, {counts['frozen']:,} frozen; images: {images}; workdir {workdir}")
    print(checkpoint.origin(workdir))
    if first:
        print(f"resuming at step {first} of {config.train.steps}")


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
