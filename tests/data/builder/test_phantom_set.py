"""The phantom dataset: whole, split by case, and the same however many processes draw it."""

from collections import Counter

import pytest

from mimo_jax.data.builder.phantom import make_phantom
from mimo_jax.data.builder.phantom_set import assign_splits, build_phantoms
from mimo_jax.data.records import DataError, open_records


def test_workers_do_not_change_what_is_written(tmp_path):
    alone = build_phantoms(tmp_path / "a", 20, seed=2, progress=False)
    shared = build_phantoms(tmp_path / "b", 20, seed=2, workers=2, progress=False)
    assert [s["sha256"] for p in alone["splits"].values() for s in p["shards"]] == [
        s["sha256"] for p in shared["splits"].values() for s in p["shards"]
    ]
    assert {name: split["records"] for name, split in alone["splits"].items()} == {"test": 1, "train": 18, "val": 1}
    assert alone["seed"] == 2
    train = open_records(tmp_path / "a", "train")
    record = train[3]
    expected = make_phantom(2, int(record.id.rsplit("_", 1)[1]))
    assert record.to_bytes() == expected.to_bytes()


def test_shares_are_kept_and_every_split_gets_some():
    groups = [f"g{i}" for i in range(200)]
    assigned = assign_splits(groups, {"train": 0.9, "val": 0.05, "test": 0.05}, 0)
    assert Counter(assigned.values()) == {"train": 180, "val": 10, "test": 10}
    assert assigned == assign_splits(groups[::-1], {"train": 0.9, "val": 0.05, "test": 0.05}, 0)
    assert assigned != assign_splits(groups, {"train": 0.9, "val": 0.05, "test": 0.05}, 1)
    assert set(assign_splits(groups[:3], {"train": 0.9, "val": 0.05, "test": 0.05}, 0).values()) == {"train", "val", "test"}
    assert set(assign_splits(groups, {"train": 1.0, "val": 0.0}, 0).values()) == {"train"}


@pytest.mark.parametrize(
    ("images", "splits", "message"),
    [(0, {"train": 1.0}, "1 or more"), (2, {"a": 1, "b": 1, "c": 1}, "cannot fill"), (4, {"a": -1.0, "b": 1}, "share"), (4, {}, "share")],
)
def test_wrong_requests_say_so(tmp_path, images, splits, message):
    with pytest.raises(DataError, match=message):
        build_phantoms(tmp_path / "x", images, splits=splits, progress=False)
    assert not (tmp_path / "x").exists()
