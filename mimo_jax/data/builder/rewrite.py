"""Writes a record folder from others: merges several, or splits one again. Images, masks and questions stay as they are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from mimo_jax import files
from mimo_jax.data.builder.build_plan import SPLITS, Options, Splits, decide_splits
from mimo_jax.data.builder.item_batches import BuildIndex, ItemBatch, index_row
from mimo_jax.data.builder.record import perceptual_hash
from mimo_jax.data.records import RecordFolder, read_info, write_records
from mimo_jax.data.schema import Record
from mimo_jax.data.transforms import decode_image


def merge_folders(folders: Sequence[str | os.PathLike], out: str | os.PathLike, options: Options, progress: bool = True) -> dict:
    """Write the records of all `folders`, each in its present split, to the new folder `out`; returns its dataset_info.

    Of records with the same id, all but the first are renamed. Raises DataError for a path that is not a record folder and for a
    group that is in two splits; LeakError as described in `Options`."""
    folders = [Path(folder) for folder in folders]
    merged = [_kept_info(folder) for folder in folders]
    name = "+".join(dict.fromkeys(entry.get("name", "") for entry in merged))
    info = {"name": name, "builder": "mimo data merge", "merged": merged, "duplicates": options.duplicates}
    return _rewrite(folders, Path(out), info, options, lambda record: (record.group, record.split), progress)


def split_folder(folder: str | os.PathLike, out: str | os.PathLike | None, by: str, options: Options, progress: bool = True) -> dict:
    """Write the records of `folder` to `out`, split again: all records of a group (or data set) go into one split. Without `out`, the
    new folder replaces the old one once it is complete. by: "group" or "dataset". Raises as `merge_folders` does."""
    folder = Path(folder)
    files.restore(folder)
    settings = {"ratios": dict(options.shares), "split_by": by, "split_seed": options.seed, "duplicates": options.duplicates}
    info = {**_kept_info(folder), **settings}
    return _rewrite([folder], Path(out or folder), info, options, lambda record: (getattr(record, by), ""), progress, out is None)


def _kept_info(folder: Path) -> dict:
    """The dataset_info of a folder without what is written again."""
    return {key: value for key, value in read_info(folder).items() if key not in ("splits", "files")}


def _rewrite(
    folders: Sequence[Path], out: Path, info: dict, options: Options, kept: Callable, progress: bool, replace: bool = False
) -> dict:
    """kept: function from a record to (the group that must stay in one split, the split that it keeps or "")."""
    options.check()
    bar = {"unit": "image", "disable": not progress}
    total = sum(split["records"] for folder in folders for split in read_info(folder)["splits"].values())
    index, names = BuildIndex(), []
    for record in tqdm(_records(folders), desc="read", total=total, **bar):
        fine_hash = perceptual_hash(decode_image(record.image, name=f"record {record.id}"))[1] if record.phash64 else bytes(32)
        row = index_row(record.id, record, fine_hash)
        row[4:6] = kept(record)
        index.add(ItemBatch(0, "", [row], [], []))
        names.append(record.id)
    ids = [*_unique(names)]
    decided = decide_splits(index, ids, options, names, out.absolute().parent / f"{out.name}.near_duplicates.jsonl")
    counts = Counter(text for _, text, _ in decided.warnings)
    records = tqdm(_placed(_records(folders), ids, decided), desc="write", total=int((~decided.dropped).sum()), **bar)
    warnings = {**info.get("warnings", {}), **dict(sorted(counts.items()))}
    return write_records(out, records, {**info, "warnings": warnings}, options.shard_bytes, replace)


def _records(folders: Iterable[Path]) -> Iterator[Record]:
    for folder in folders:
        for split in sorted(read_info(folder)["splits"]):
            records = RecordFolder(folder, split)
            yield from (records[i] for i in range(len(records)))


def _unique(names: Iterable[str]) -> Iterator[str]:
    """The names, with -2, -3, … appended to repeated ones."""
    used: set[str] = set()
    for name in names:
        number, new = 2, name
        while new in used:
            new, number = f"{name}-{number}", number + 1
        used.add(new)
        yield new


def _placed(records: Iterable[Record], ids: Sequence[str], decided: Splits) -> Iterator[Record]:
    for record, record_id, split, dropped in zip(records, ids, decided.split_index.tolist(), decided.dropped.tolist(), strict=True):
        if dropped:
            continue
        record.split = SPLITS[split]
        if record.id != record_id:
            record.id = record_id
            for number, sample in enumerate(record.samples):
                sample.sample_id = f"{record_id}/{number}"
        yield record
