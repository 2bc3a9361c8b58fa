"""A source to a record folder, in two passes over its items: records, then, once all are known, splits and questions.

OUT is there once it is whole. Until then the work lies beside it in .OUT.building, and the same command goes on with it:
  parts/    the first pass, see `parts`
  shards/   the second: records with their questions, as they will stand in OUT, and of each file what `records.Shard` says
  out/      OUT, while it is put together
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
from mimo_jax.data.builder.build_plan import BUILDER_VERSION, NOTES, Options, Plan, ShardJob, make_plan, write_lines
from mimo_jax.data.builder.item_batches import BuildIndex, in_parts, known_file, make_part, read_records
from mimo_jax.data.builder.items import Reader
from mimo_jax.data.builder.question_generation import QuestionGeneration
from mimo_jax.data.builder.workers import Workers
from mimo_jax.data.records import SAMPLES, DataError, IndexBuilder, Shard, ShardWriter, join_shards
from mimo_jax.data.schema import Record

REJECTS = "rejects.jsonl"


def build(reader: Reader, out: str | os.PathLike, options: Options, workers: int | Workers = 1, progress: bool = True) -> dict | None:
    """Write the record folder `out` of all items of a source; returns what stands in its dataset_info.json, or None where a
    signal asked to stop: the same call goes on then, as it does after a kill. The contents depend on items, their files and
    `options` alone, not on `workers`: a number of processes, or what else runs jobs.

    Raises DataError, with `out` not there, where it holds something or another process builds it, where more than
    `max_rejects` of the items have no record, and for what the disk does not take; LeakError as `Options` says."""
    out = Path(out)
    options.check()
    with _claimed(out) as work, Workers(workers) if isinstance(workers, int) else workers as pool:
        bar = functools.partial(tqdm, unit="image", disable=not progress)
        known = _first_pass(reader, work, options, pool, bar)
        if pool.stopped:
            return None
        plan = make_plan(work, known, options)
        shards, left_out = _second_pass(work, plan, pool, bar)
        if pool.stopped:
            return None
        info = {
            "name": reader.name, "builder": "mimo data build", "builder_version": BUILDER_VERSION, "seed": options.seed,
            "ratios": dict(options.shares), "perspectives": list(options.perspectives), "duplicates": options.duplicates,
            "qa": options.qa, "model": plan.asking.model, "written_left_out": dict(sorted(left_out.items())),
            **plan.told, "items": len(known) + known.rejected, "rejected": known.rejected,
        }  # fmt: skip
        return _put_together(work, out, info, shards)


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """The work folder, of this process alone."""
    files.check_new(out)
    work = out.absolute().parent / f".{out.name}.building"
    with files.claimed(work, out):
        for name in ("parts", "shards"):
            (work / name).mkdir(exist_ok=True)
        try:
            yield work
        finally:
            if work.is_dir() and not any((work / "parts").iterdir()):  # nothing to go on with
                shutil.rmtree(work)


# --- the first pass


def _first_pass(reader: Reader, work: Path, options: Options, pool: Workers, bar: Callable) -> BuildIndex:
    known, troubled = BuildIndex(), []
    make = functools.partial(make_part, work / "parts", BUILDER_VERSION)
    with bar(desc="records") as progress, open(work / REJECTS, "w") as rejects, open(work / NOTES, "w") as notes:
        for part in pool.map(make, in_parts(reader.items())):
            known.add(part)
            write_lines(rejects, ({"id": item, "reason": reason} for item, reason in part.rejects))
            write_lines(notes, ({"id": item, "note": note} for item, note in part.notes))
            troubled += [part.number] * bool(part.rejects)
            progress.update(len(part.rows) + len(part.rejects))
        write_lines(notes, ({"id": what, "note": f"passed over: {reason}"} for what, reason in reader.skipped))
    items = len(known) + known.rejected
    if pool.stopped:
        return known
    if not items:
        raise DataError(f"{reader.name}: the source holds no item")
    if known.rejected > options.max_rejects * items:
        for number in troubled:  # what is mended must be read again
            known_file(work / "parts", number).unlink()
        with open(work / REJECTS) as rejects:
            first = json.loads(rejects.readline())
        raise DataError(
            f"{known.rejected} of {items} items have no record, such as {first['id']}: {first['reason']}; all stand in {work / REJECTS}; "
            "mend them or raise --max-rejects"
        )
    return known


# --- the second pass


def _second_pass(work: Path, plan: Plan, pool: Workers, bar: Callable) -> tuple[dict[str, list[Shard]], Counter[str]]:
    """(of each split its shards; what a language model wrote and was left out, by its reason)."""
    shards: dict[str, list[Shard]] = {}
    left_out: Counter[str] = Counter()
    with bar(desc="questions", total=plan.records) as progress:
        for split, shard, rejects in pool.map(functools.partial(write_shard, work, plan.asking), plan.jobs):
            shards.setdefault(split, []).append(shard)
            left_out.update(rejects)
            progress.update(len(shard.index.ids))
    return shards, left_out


def write_shard(work: Path, asking: QuestionGeneration, job: ShardJob) -> tuple[str, Shard, dict[str, int]]:
    """Records with their questions to the shard of a job, unless it is there: (split, shard, what was left out)."""
    path = work / "shards" / job.name
    said = path.with_suffix(".said")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        fingerprint, shard, left_out = msgpack.unpackb(said.read_bytes())
        if fingerprint == job.fingerprint and path.is_file() and path.with_name(path.name + SAMPLES).is_file():
            return job.split, Shard(**{**shard, "index": IndexBuilder(**shard["index"])}), left_out
    said.unlink(missing_ok=True)
    writer, left_out = ShardWriter(path), Counter()
    for record, rejects in asking.asked(_named(work, asking, job)):
        writer.add(record)
        left_out.update(rejects)
    shard = writer.close()
    with files.atomic_write(said) as part:
        part.write_bytes(msgpack.packb([job.fingerprint, vars(shard), left_out], default=vars))
    return job.split, shard, left_out


def _named(work: Path, asking: QuestionGeneration, job: ShardJob) -> Iterator[tuple[Record, bool, list[str]]]:
    """(record, complete, absent) of a job, with the id and split that are decided."""
    records = read_records(work / "parts", job.places, asking.counts)
    for (_, _, record_id), (record, complete, absent) in zip(job.places, records, strict=True):
        record.id, record.split = record_id, job.split
        yield record, complete, absent


def _put_together(work: Path, out: Path, info: dict, shards: Mapping[str, Sequence[Shard]]) -> dict:
    whole = work / "out"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    for shard in (shard for of in shards.values() for shard in of):
        for name in (shard.file, shard.file + SAMPLES):
            os.replace(work / "shards" / name, whole / name)
    lists = [name for name in (REJECTS, NOTES) if (work / name).stat().st_size]
    for name in lists:
        shutil.copyfile(work / name, whole / name)
    written = join_shards(whole, shards, {**info, "files": [{"file": name, "sha256": files.sha256(whole / name)} for name in lists]})
    os.rename(whole, out)  # takes the place of an empty folder
    shutil.rmtree(work)
    return written
