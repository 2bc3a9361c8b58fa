"""Record folders to another: several into one, or one split anew. Pictures, masks and questions stay as they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from mimo_jax import files
from mimo_jax.data.builder.build_plan import SPLITS, Options, Splits, decide_splits
from mimo_jax.data.builder.item_batches import BuildIndex, ItemBatch, row_of
from mimo_jax.data.builder.record import perceptual_hash
from mimo_jax.data.records import RecordFolder, read_info, write_records
from mimo_jax.data.schema import Record
from mimo_jax.data.transforms import decode_image

BY = ("group", "dataset")  # what stays together when a folder is split


def merge_folders(folders: Sequence[str | os.PathLike], out: str | os.PathLike, options: Options, progress: bool = True) -> dict:
    """Write the records of all `folders`, each in the split that it has, to the new folder `out`; returns its dataset_info.

    Of records with the same id all but the first are renamed. Raises DataError for a folder that is none, or a group that is in
    two splits; LeakError as `Options` says."""
    folders = [Path(folder) for folder in folders]
    told = {"builder": "mimo data merge", "merged": [_told(folder) for folder in folders], "duplicates": options.duplicates}
    info = {"name": "+".join(dict.fromkeys(entry.get("name", "") for entry in told["merged"])), **told}
    return _rewrite(folders, Path(out), info, options, lambda record: (record.group, record.split), progress)


def split_folder(folder: str | os.PathLike, out: str | os.PathLike | None, by: str, options: Options, progress: bool = True) -> dict:
    """Write the records of `folder` to `out`, split anew: all of one group (or data set) into one split. Without `out` the new
    folder takes the old one's place, once it is whole. Raises as `merge_folders` does."""
    folder = Path(folder)
    files.restore(folder)
    told = {"ratios": dict(options.shares), "split_by": by, "split_seed": options.seed, "duplicates": options.duplicates}
    info = {**_told(folder), **told}
    return _rewrite([folder], Path(out or folder), info, options, lambda record: (getattr(record, by), ""), progress, out is None)


def _told(folder: Path) -> dict:
    return {key: value for key, value in read_info(folder).items() if key not in ("splits", "files")}


def _rewrite(
    folders: Sequence[Path], out: Path, info: dict, options: Options, kept: Callable, progress: bool, replace: bool = False
) -> dict:
    """kept: record -> (the group that stays together, the split that it keeps or "")."""
    options.check()
    bar = {"unit": "image", "disable": not progress}
    total = sum(split["records"] for folder in folders for split in read_info(folder)["splits"].values())
    known, names = BuildIndex(), []
    for record in tqdm(_records(folders), desc="read", total=total, **bar):
        looks = perceptual_hash(decode_image(record.image, name=f"record {record.id}"))[1] if record.phash64 else bytes(32)
        row = row_of(record.id, record, looks)
        row[4:6] = kept(record)
        known.add(ItemBatch(0, "", [row], [], []))
        names.append(record.id)
    ids = [*_unique(names)]
    decided = decide_splits(known, ids, options, names, out.absolute().parent / f"{out.name}.alike.jsonl")
    counted = {note: sum(1 for _, said, _ in decided.notes if said == note) for note in sorted({said for _, said, _ in decided.notes})}
    records = tqdm(_placed(_records(folders), ids, decided), desc="write", total=int((~decided.dropped).sum()), **bar)
    return write_records(out, records, {**info, "notes": {**info.get("notes", {}), **counted}}, options.shard_bytes, replace)


def _records(folders: Iterable[Path]) -> Iterator[Record]:
    for folder in folders:
        for split in sorted(read_info(folder)["splits"]):
            records = RecordFolder(folder, split)
            yield from (records[i] for i in range(len(records)))


def _unique(names: Iterable[str]) -> Iterator[str]:
    """The names, -2, -3, … added to those that came before."""
    seen: set[str] = set()
    for name in names:
        number, new = 2, name
        while new in seen:
            new, number = f"{name}-{number}", number + 1
        seen.add(new)
        yield new


def _placed(records: Iterable[Record], ids: Sequence[str], decided: Splits) -> Iterator[Record]:
    for record, record_id, at, dropped in zip(records, ids, decided.at.tolist(), decided.dropped.tolist(), strict=True):
        if dropped:
            continue
        record.split = SPLITS[at]
        if record.id != record_id:
            record.id = record_id
            for number, sample in enumerate(record.samples):
                sample.sample_id = f"{record_id}/{number}"
        yield record
