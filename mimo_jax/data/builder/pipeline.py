"""Builds a record folder from a source in two passes over its items: records first; then, once all are known, splits and questions.

OUT appears once it is complete. Until then the work is in .OUT.building next to it, and the same command resumes it:
  batches/  the first pass, see `item_batches`
  shards/   the second pass: records with their questions, as OUT will contain them, and a summary (`records.Shard`) of each file
  out/      OUT, while it is assembled
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgpack
from tqdm import tqdm

from mimo_jax import files
from mimo_jax.data.builder.build_plan import BUILDER_VERSION, WARNINGS, BuildPlan, Options, ShardJob, make_plan, write_lines
from mimo_jax.data.builder.item_batches import BuildIndex, batch_items, make_batch, read_records, summary_file
from mimo_jax.data.builder.items import Reader
from mimo_jax.data.builder.question_generation import QuestionGeneration
from mimo_jax.data.builder.workers import Workers
from mimo_jax.data.records import SAMPLES, DataError, IndexBuilder, Shard, ShardWriter, join_shards
from mimo_jax.data.schema import Record

REJECTS = "rejects.jsonl"


def build(reader: Reader, out: str | os.PathLike, options: Options, workers: int | Workers = 1, progress: bool = True) -> dict | None:
    """Write the record folder `out` with all items of a source. Returns the contents of its dataset_info.json, or None if a signal
    asked to stop; the same call then resumes the build, as it does after a kill. The contents depend only on the items, their files
    and `options`, not on `workers`, which is a number of processes or an object that runs jobs.

    Raises UserError, without creating `out`, if `out` is not empty or another process builds it; its subclass DataError if more than
    `max_rejects` of the items have no record, or if the disk is full; LeakError as described in `Options`."""
    out = Path(out)
    options.check()
    with _locked_work_folder(out) as work, Workers(workers) if isinstance(workers, int) else workers as pool:
        bar = functools.partial(tqdm, unit="image", disable=not progress)
        index = _first_pass(reader, work, options, pool, bar)
        if pool.stopped:
            return None
        plan = make_plan(work, index, options)
        shards, num_rejected = _second_pass(work, plan, pool, bar)
        if pool.stopped:
            return None
        info = {
            "name": reader.name, "builder": "mimo data build", "builder_version": BUILDER_VERSION, "seed": options.seed,
            "ratios": dict(options.shares), "perspectives": list(options.perspectives), "duplicates": options.duplicates,
            "qa": options.qa, "model": plan.questions.model, "rejected_questions": dict(sorted(num_rejected.items())),
            **plan.info, "items": len(index) + index.rejected, "rejected": index.rejected,
        }  # fmt: skip
        return _assemble(work, out, info, shards)


@contextlib.contextmanager
def _locked_work_folder(out: Path) -> Iterator[Path]:
    """The work folder, locked so that only this process writes to it."""
    files.check_new(out)
    work = out.absolute().parent / f".{out.name}.building"
    with files.claimed(work, out):
        for name in ("batches", "shards"):
            (work / name).mkdir(exist_ok=True)
        try:
            yield work
        finally:
            if work.is_dir() and not any((work / "batches").iterdir()):  # nothing to resume
                shutil.rmtree(work)


# --- the first pass


def _first_pass(reader: Reader, work: Path, options: Options, pool: Workers, bar: Callable) -> BuildIndex:
    index, incomplete = BuildIndex(), []
    make = functools.partial(make_batch, work / "batches", BUILDER_VERSION)
    with bar(desc="records") as progress, open(work / REJECTS, "w") as rejects, open(work / WARNINGS, "w") as warnings:
        for batch in pool.map(make, batch_items(reader.items())):
            index.add(batch)
            write_lines(rejects, ({"id": item, "reason": reason} for item, reason in batch.rejects))
            write_lines(warnings, ({"id": item, "warning": warning} for item, warning in batch.warnings))
            incomplete += [batch.number] * bool(batch.rejects)
            progress.update(len(batch.rows) + len(batch.rejects))
        write_lines(warnings, ({"id": what, "warning": f"skipped: {reason}"} for what, reason in reader.skipped))
    items = len(index) + index.rejected
    if pool.stopped:
        return index
    if not items:
        raise DataError(f"{reader.name}: the source has no item")
    if index.rejected > options.max_rejects * items:
        for number in incomplete:  # once the source is fixed, these items must be read again
            summary_file(work / "batches", number).unlink()
        with open(work / REJECTS) as rejects:
            first = json.loads(rejects.readline())
        raise DataError(
            f"{index.rejected} of {items} items have no record, such as {first['id']}: {first['reason']}; all are listed in "
            f"{work / REJECTS}; fix them or raise --max-rejects"
        )
    return index


# --- the second pass


def _second_pass(work: Path, plan: BuildPlan, pool: Workers, bar: Callable) -> tuple[dict[str, list[Shard]], Counter[str]]:
    """(the shards of each split; how many questions written by a language model were rejected, by reason)."""
    shards: dict[str, list[Shard]] = {}
    num_rejected: Counter[str] = Counter()
    with bar(desc="questions", total=plan.num_records) as progress:
        for split, shard, rejects in pool.map(functools.partial(write_shard, work, plan.questions), plan.jobs):
            shards.setdefault(split, []).append(shard)
            num_rejected.update(rejects)
            progress.update(len(shard.index.ids))
    return shards, num_rejected


def write_shard(work: Path, questions: QuestionGeneration, job: ShardJob) -> tuple[str, Shard, dict[str, int]]:
    """Write the records of a job with their questions, unless its shard already exists. Returns (split, shard, number of rejected
    questions by reason)."""
    path = work / "shards" / job.name
    summary = path.with_suffix(".summary")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        fingerprint, shard, num_rejected = msgpack.unpackb(summary.read_bytes())
        if fingerprint == job.fingerprint and path.is_file() and path.with_name(path.name + SAMPLES).is_file():
            return job.split, Shard(**{**shard, "index": IndexBuilder(**shard["index"])}), num_rejected
    summary.unlink(missing_ok=True)
    writer, num_rejected = ShardWriter(path), Counter()
    for record, rejects in questions.generate(_records_of(work, questions, job)):
        writer.add(record)
        num_rejected.update(rejects)
    shard = writer.close()
    with files.atomic_write(summary) as part:
        part.write_bytes(msgpack.packb([job.fingerprint, vars(shard), num_rejected], default=vars))
    return job.split, shard, num_rejected


def _records_of(work: Path, questions: QuestionGeneration, job: ShardJob) -> Iterator[tuple[Record, bool, list[str]]]:
    """(record, complete, absent) of a job, each record with its final id and split."""
    records = read_records(work / "batches", job.places, questions.counts)
    for (_, _, record_id), (record, complete, absent) in zip(job.places, records, strict=True):
        record.id, record.split = record_id, job.split
        yield record, complete, absent


def _assemble(work: Path, out: Path, info: dict, shards: Mapping[str, Sequence[Shard]]) -> dict:
    target = work / "out"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for shard in (shard for split in shards.values() for shard in split):
        for name in (shard.file, shard.file + SAMPLES):
            os.replace(work / "shards" / name, target / name)
    lists = [name for name in (REJECTS, WARNINGS) if (work / name).stat().st_size]
    for name in lists:
        shutil.copyfile(work / name, target / name)
    written = join_shards(target, shards, {**info, "files": [{"file": name, "sha256": files.sha256(target / name)} for name in lists]})
    os.rename(target, out)  # replaces an empty folder
    shutil.rmtree(work)
    return written
