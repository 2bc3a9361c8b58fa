"""The frozen base: written once, found wherever it is, held to its hashes."""

import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax import pathtree
from mimo_jax.checkpoints import checkpoint, frozen_params, loading
from mimo_jax.checkpoints.checkpoint import CheckpointError
from tests.small_run import assert_same, begin, flip_bit, frozen_tree
from tests.tiny_config import tiny_config


def test_base_comes_back_bit_for_bit_in_its_dtypes(tmp_path):
    begin(tmp_path)
    assert_same(frozen_params.load(tmp_path), frozen_tree())
    assert_same(frozen_params.load(tmp_path, jax.eval_shape(frozen_tree)), frozen_tree())


def test_fingerprint_follows_names_dtypes_shapes_and_values(tmp_path):
    tree = {"a": jnp.arange(4.0)}
    variants = [tree, {"b": jnp.arange(4.0)}, {"a": jnp.arange(4)}, {"a": jnp.arange(4.0).reshape(2, 2)}, {"a": jnp.arange(4.0) + 1e-6}]
    prints = {frozen_params.save(_made(tmp_path / str(i)), variant) for i, variant in enumerate(variants)}
    assert len(prints) == len(variants)
    assert frozen_params.save(_made(tmp_path / "again"), {"a": np.arange(4, dtype=np.float32)}) in prints


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_base_is_written_once(tmp_path):
    begin(tmp_path)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "base").rglob("*")}
    frozen_params.save(tmp_path, frozen_tree())
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "base").rglob("*")} == before


def test_another_base_in_a_run_with_steps_is_refused(tmp_path):
    begin(tmp_path, steps=(1,))
    with pytest.raises(CheckpointError, match="another frozen base"):
        frozen_params.save(tmp_path, frozen_tree(1))


def test_base_of_another_checkpoint_is_referred_to_and_found_wherever_it_is_moved(tmp_path):
    lender, run = tmp_path / "runs" / "import", tmp_path / "runs" / "b"
    begin(lender, steps=(0,))
    part = {"llm": frozen_tree()["llm"]}
    checkpoint.open_run(run, tiny_config())
    frozen_params.save(run, part, source=lender)
    (run / "config.json").write_text((lender / "config.json").read_text())
    assert not (run / "base").exists()
    assert_same(frozen_params.load(run), part)  # by the recorded path

    (tmp_path / "runs").rename(tmp_path / "moved")
    run = tmp_path / "moved" / "b"
    assert_same(frozen_params.load(run), part)  # by the relative path

    (tmp_path / "moved" / "import").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is not found: .*name its folder with --base DIR"):
        frozen_params.load(run)
    assert_same(frozen_params.load(run, base=tmp_path / "elsewhere"), part)
    assert_same(frozen_params.load(run, base=tmp_path / "elsewhere" / "base"), part)


def test_a_wrong_or_damaged_base_is_refused(tmp_path):
    run, other = tmp_path / "a", tmp_path / "other"
    begin(run)
    begin(other, frozen=frozen_tree(1))
    flip_bit(run / "base" / "arrays")
    with pytest.raises(CheckpointError, match=r"a/base is damaged \(SHA-256.*other/base is another base: .*vision/kernel"):
        frozen_params.load(run, base=other)


def test_a_bit_flipped_in_any_file_of_the_base_stops_and_names_it(tmp_path):
    begin(tmp_path)
    for file in sorted(f for f in [*(tmp_path / "base").rglob("*"), tmp_path / "base.json"] if f.is_file() and f.stat().st_size):
        data = file.read_bytes()
        at = len(data) // 2
        file.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        named = "manifest.json" if file.name == "manifest.sha256" else file.name
        with pytest.raises(CheckpointError, match=re.escape(named) if file.name != "manifest.json" else "manifest|not a complete base"):
            frozen_params.load(tmp_path)
        file.write_bytes(data)
    assert_same(frozen_params.load(tmp_path), frozen_tree())


def test_base_of_other_shapes_is_listed(tmp_path):
    begin(tmp_path)
    wanted = pathtree.flatten(jax.eval_shape(frozen_tree))
    wanted["vision/kernel"] = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    with pytest.raises(CheckpointError, match=r"vision/kernel is bfloat16\[8, 4\], the config needs float32\[8, 4\]"):
        frozen_params.load(tmp_path, pathtree.unflatten(wanted))


def test_a_base_swapped_under_a_step_is_noticed(tmp_path):
    run, other = tmp_path / "a", tmp_path / "other"
    begin(run, steps=(3,))
    begin(other, frozen=frozen_tree(1))
    shutil.copy(other / "base.json", run)
    with pytest.raises(CheckpointError, match="another frozen base"):
        loading.load_params(run)
