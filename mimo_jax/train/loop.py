"""`mimo train`: trains the model of a config and writes checkpoints, metrics, evaluation reports and overlays to a working directory.

The same command resumes a stopped run: parameters, optimizer state, step and data position are restored, and the next step is
bit-identical to that of an uninterrupted run.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import jax
from tqdm import tqdm

from mimo_jax import distributed, files, pathtree, sharding
from mimo_jax.analysis import run_summary
from mimo_jax.checkpoints import checkpoint, frozen_params, loading
from mimo_jax.checkpoints.checkpoint import CheckpointError, Checkpoints
from mimo_jax.config import Config, ConfigError
from mimo_jax.data import conversation
from mimo_jax.data.loading import encode_features
from mimo_jax.data.loading.loader import Loader, make_loader
from mimo_jax.data.loading.sources import open_sources
from mimo_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mimo_jax.distributed import PreemptionGuard
from mimo_jax.errors import EXIT_OK, EXIT_TEMPFAIL, config_path
from mimo_jax.models import llama, mimo
from mimo_jax.train import global_batch, resume
from mimo_jax.train.evaluations import Evaluations
from mimo_jax.train.goodput import Goodput
from mimo_jax.train.guard import NonFiniteGuard
from mimo_jax.train.hooks import Save, StepInfo
from mimo_jax.train.metrics import Metrics
from mimo_jax.train.state import TrainSetup
from mimo_jax.train.step import make_step
from mimo_jax.train.unusable import UnusableSamples
from mimo_jax.train.writers import MetricWriters, check_writers


def train(config: Config, workdir: str | Path) -> int:
    """Train to `config.train.steps`; returns the exit code: 0 done, 75 stopped on request with the state saved. If there are several
    processes (`distributed.run`), all must call it.

    Raises UserError subclasses (exit 2) before any work if the config, the data or a checkpoint cannot be used."""
    began = time.time()
    stop = PreemptionGuard()
    try:
        return _train(config, workdir, began, stop)
    finally:
        distributed.send_heartbeat(0)
        stop.restore()


def _train(config: Config, workdir: str | Path, began: float, stop: PreemptionGuard) -> int:
    if any(distributed.gather(stop.requested())):
        print("stopped before anything was done; run the same command again", file=sys.stderr)
        return EXIT_TEMPFAIL
    resumed = prepare(config, workdir)
    config, loader = resumed.setup.config, resumed.loader
    run_summary.print_summary(resumed.setup, resumed.sources, resumed.checkpoints.workdir, resumed.first)
    print("\n".join(run_summary.schedule_lines(config, loader.num_samples, *loader.tokens_per_sample())))
    workdir, first, total = resumed.checkpoints.workdir, resumed.first, config.train.steps
    with Goodput(workdir, began, first, total, resumed.restored) as goodput, MetricWriters(config, workdir, first) as writers:
        code = run_steps(resumed, goodput, writers, stop)
    print(goodput.summary())
    return code


class ResumedTraining(NamedTuple):
    """A run that is ready for its next step. first: number of steps done; restored: seconds that restoring took, 0 for a new run."""

    setup: TrainSetup
    state: dict
    frozen: dict
    loader: Loader
    tokenizer: Tokenizer
    sources: dict
    checkpoints: Checkpoints
    first: int
    restored: float


def prepare(config: Config, workdir: str | Path, other_data: bool = False) -> ResumedTraining:
    """Open the run in `workdir`, or start it. other_data: a run may be opened with other data than it was trained on. Raises UserErrors
    as `train` does."""
    config.validate()
    check_writers(config)
    workdir = Path(workdir)
    if not config.data.sources:
        raise ConfigError("config.data.sources: is empty; name a dataset with --data DIR")
    resumed = distributed.gather(checkpoint.open_run(workdir, config))[0]
    mesh = sharding.make_mesh(config.mesh)
    setup = TrainSetup(config, mesh)
    if config.data.features:
        encode_features.check_frozen(path for path in setup.multipliers if setup.trains(path))
    sources = open_sources(config, config.data.split)
    tokenizer = _tokenizer(config, workdir, sources)
    loader = make_loader(config, tokenizer, sources, global_batch.local_images(mesh, config.images()))
    checkpoints = Checkpoints(workdir, config.train.keep_last, config.train.keep_every)
    if resumed and not other_data and checkpoints.latest() is not None:
        resume.check_data(config, sources, workdir)
    if config.train.epochs:
        config = resume.resolve_steps(config, loader.num_samples, checkpoint.read_config(workdir) if resumed else None)
        setup = TrainSetup(config, mesh)

    since = time.perf_counter()
    state, frozen = _restore(setup, checkpoints, loader) if resumed else (None, None)
    has_checkpoint = state is not None
    restored = time.perf_counter() - since if has_checkpoint else 0.0
    if not has_checkpoint:
        state, frozen = setup.start(_initial_params(setup))
    if config.data.features:
        loader.use_features(encode_features.fingerprint(config, pathtree.flatten(frozen)), mimo.feature_shapes(config))
    if not has_checkpoint:
        if jax.process_index() == 0:
            resume.write_fingerprints(sources, workdir)
        checkpoint.start_run(workdir, config, frozen)
    return ResumedTraining(setup, state, frozen, loader, tokenizer, sources, checkpoints, _num_steps_done(loader), restored)


def run_steps(resumed: ResumedTraining, goodput: Goodput, writers: MetricWriters, stop: PreemptionGuard) -> int:
    """Run all remaining steps and evaluations, then the final calibration and evaluation; returns the exit code. A request to stop is
    followed before the first step, after each step, and within an evaluation; what was interrupted is made up by the same command."""
    setup, frozen, loader, checkpoints = resumed.setup, resumed.frozen, resumed.loader, resumed.checkpoints
    config = setup.config
    evaluations = Evaluations(setup, frozen, resumed.tokenizer, checkpoints, goodput, writers, stop)
    guard, metrics = NonFiniteGuard(config.train, checkpoints, loader.records), Metrics(config, goodput, writers)
    unusable = UnusableSamples(config.train, loader, checkpoints.workdir / "bad_samples.jsonl")
    save = Save(checkpoints, (config.train.checkpoint_every, config.train.eval_every), goodput)
    state, done = resumed.state, resumed.first
    last = ExitStack()  # from the last step on
    try:
        stopped = any(distributed.gather(stop.requested()))
        if done < config.train.steps and not stopped:
            stopped = not evaluations.at(done, state)  # one that was interrupted
        if done < config.train.steps and not stopped:
            for info in steps(setup, state, frozen, loader, stop, config.train.steps):
                if info.last:
                    last.enter_context(stop.last_save())
                for hook in (guard, metrics, unusable, save):
                    hook(info)
                state, done = info.state, info.step
                if not info.last and not evaluations.at(done, state):
                    metrics.flush()
                    break
            stopped = done < config.train.steps
    finally:
        distributed.send_heartbeat(0)
        with last:
            for hook in (guard, metrics, unusable, save):
                hook.close()
            loader.close()
    if stopped or not evaluations.finish(done, state):
        goodput.stopped = True
        print(f"stopped at step {done}, state saved; run the same command to resume", file=sys.stderr)
        return EXIT_TEMPFAIL
    return EXIT_OK


def steps(setup: TrainSetup, state: dict, frozen: dict, loader: Loader, stop: PreemptionGuard, num_steps: int) -> Iterator[StepInfo]:
    """Yield a StepInfo per step until `num_steps` are done or a stop signal arrives. Every step consumes one batch, also a skipped one."""
    config = setup.config
    step_fn = make_step(setup)
    images = config.images()
    here = global_batch.local_images(setup.mesh, images)
    done = _num_steps_done(loader)
    batches, compiled = iter(loader), set()
    while done < num_steps:
        distributed.send_heartbeat(config.train.step_timeout)
        since = time.perf_counter()
        batch = next(batches)
        position = loader.state()
        wait = time.perf_counter() - since
        placed = global_batch.make_global_batch(setup.mesh, images, here, batch)
        length = batch["input_ids"].shape[1]
        handed = time.perf_counter()
        if length not in compiled:
            program = step_fn.lower(state, frozen, placed).compile()
            tqdm.write(run_summary.compiled_step_line(program, length, time.perf_counter() - handed))
            distributed.gather(None)  # collectives time out after half a minute, but peers may compile for longer
            compiled.add(length)
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
            state, metrics = step_fn(state, frozen, placed)
        dispatch = time.perf_counter() - handed
        done += 1
        last = done == num_steps or stop.should_stop_after(done)
        yield StepInfo(done, state, metrics, config.data.batch_size, last, lambda position=position: position, length, wait, dispatch)
        if last:
            return


def _num_steps_done(loader: Loader) -> int:
    return loader.state()["batch"]


def _tokenizer(config: Config, workdir: Path, sources: dict) -> Tokenizer:
    """Load the run's tokenizer. A new run copies that of `init.path`, else the configured file, else trains one on its data."""
    path = workdir / "tokenizer.json"
    if jax.process_index() == 0 and not path.exists():
        with files.atomic_write(path) as part:
            if config.init.path:
                with config_path("config.init.path", config.init.path):
                    _copy_tokenizer(checkpoint.tokenizer_path(config.init.path), part, config)
            elif config.tokenizer == "train":
                train_tokenizer(_corpus(config, sources), config.model.llm.vocab_size, part, config.model.grounding_tokens())
            elif config.tokenizer:
                with config_path("config.tokenizer", config.tokenizer):
                    _copy_tokenizer(Path(config.tokenizer), part, config)
            else:
                raise ConfigError('config.tokenizer: is empty; give a tokenizer.json, or "train" to train one on the data')
    distributed.gather(None)
    return load_tokenizer(path, config.model)


def _copy_tokenizer(source: Path, target: Path, config: Config) -> None:
    load_tokenizer(source, config.model)  # one that does not fit must not stay in the new run
    shutil.copy(source, target)


def _corpus(config: Config, sources: dict) -> Iterator[str]:
    """Yield every conversation of the training data formatted by the chat template, without reading any image."""
    for source in sources.values():
        for index in range(len(source)):
            for sample in source.samples(index):
                yield conversation.template_text(config, [turn.text for turn in sample.turns])


def _initial_params(setup: TrainSetup) -> dict:
    """Parameters from `init.path` if it is set, else from the seed. Those that `init.path` lacks must be matched by `init.reinit`; those
    of the grounding tokens are then drawn like the rows of its base."""
    config = setup.config
    key = jax.random.key(config.train.seed)
    if not config.init.path:
        return setup.initial_params(key)
    wanted, shardings = pathtree.flatten(setup.params), pathtree.flatten(setup.param_shardings)

    def fits(path: str, leaf) -> bool:
        return path in wanted and wanted[path].shape == leaf.shape

    def place(abstract: dict) -> dict:  # loads each parameter directly into its final sharding
        replicated = sharding.replicated(setup.mesh)
        flat = pathtree.flatten(abstract)
        return pathtree.unflatten({path: shardings[path] if fits(path, leaf) else replicated for path, leaf in flat.items()})

    with config_path("config.init.path", config.init.path):
        source = pathtree.flatten(loading.load_params(config.init.path, place=place))
    absent = [path for path in wanted if path not in source or not fits(path, source[path])]
    refused = [p for p in absent if not (config.init.reinit and re.search(config.init.reinit, p))]
    if refused:
        raise CheckpointError(
            f"{config.init.path}: these parameters are missing or have another shape: {', '.join(refused)}; "
            "use the checkpoint's model config, or let config.init.reinit match them"
        )
    initial = pathtree.flatten(setup.initial_params(key)) if absent else {}
    for path, axis in llama.GROUNDING_AXES.items():
        base = path.replace("grounding", "base")
        if path in absent and base not in absent:
            draw = jax.jit(llama.draw_grounding, static_argnums=(0, 2), out_shardings=shardings[path])
            initial[path] = draw(path, source[base], wanted[path].shape[axis], jax.random.fold_in(key, axis))
    return pathtree.unflatten({p: initial[p] if p in absent else source.pop(p).astype(leaf.dtype) for p, leaf in wanted.items()})


def _restore(setup: TrainSetup, checkpoints: Checkpoints, loader: Loader):
    """Returns (state, frozen) of the newest complete checkpoint and sets the loader to its position; (None, None) if there is none."""
    step = checkpoints.latest()
    if step is None:
        return None, None
    state, position = checkpoints.restore(step, setup.state, setup.state_shardings)
    frozen = frozen_params.load(checkpoints.workdir, setup.frozen, setup.frozen_shardings)
    loader.restore(position)
    return state, frozen
