"""Torch files without torch: the same values as torch reads, and nothing else is read."""

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints_convert import torch_zip

PROGRAM = """
import sys
sys.modules["torch"] = None  # as if it were not installed
from checkpoints_convert.readers import open_tensors
found = open_tensors(sys.argv[1])
print({key: (str(value.dtype), value.shape, float(value.sum())) for key, value in found.items()})
"""


def test_every_kind_of_storage_and_view(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    values = {str(kind): torch.arange(7).to(kind) for kind in (*kinds, torch.bool)}
    views = {"turned": whole.t(), "part": whole[1:3, 2:], "step": whole[:, ::2], "one": whole[2, 3], "none": whole[:0]}
    views["spread"] = whole[0].expand(3, 6)
    torch.save(OrderedDict(values | views), tmp_path / "m.pth")
    found = torch_zip.load(tmp_path / "m.pth")
    assert found.keys() == values.keys() | views.keys()
    for key, wanted in (values | views).items():
        assert found[key].dtype.name == str(wanted.dtype).removeprefix("torch.") and found[key].shape == tuple(wanted.shape), key
        assert np.array_equal(found[key].astype(np.float64), wanted.double().numpy()), key
        assert not found[key].size or not found[key].flags.writeable, key


@pytest.mark.parametrize("value", [torch.eye(3).to_sparse(), torch.nn.Linear(2, 2), torch.ones(2, dtype=torch.complex64), print], ids=str)
def test_anything_else_is_left_to_torch(tmp_path, value):
    torch.save({"a": torch.ones(2), "x": value}, tmp_path / "m.pth")
    assert torch_zip.load(tmp_path / "m.pth") is None
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch_zip.load(tmp_path / "old.pth") is None


def test_a_tensor_outside_of_its_storage_is_refused():
    with pytest.raises(Exception, match="outside"):
        torch_zip._tensor(np.zeros(5, np.float32), 2, (2, 2), (2, 1))
    with pytest.raises(Exception, match="outside"):
        torch_zip._tensor(np.zeros(5, np.float32), 4, (2,), (-1,))


def test_without_torch(tmp_path):
    torch.save({"model": {"a": torch.ones(2, 3)}}, tmp_path / "m.pth")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    plain, old = (run(tmp_path / name) for name in ("m.pth", "old.pth"))
    assert plain.stdout == "{'a': ('float32', (2, 3), 6.0)}\n"
    assert "only torch can read this file, but it is not installed; pip install" in old.stderr


def run(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, timeout=120)
