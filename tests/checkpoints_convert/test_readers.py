"""Files of tensors as they lie on people's disks, whole and damaged."""

import json
import os
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoints_convert import readers
from checkpoints_convert.readers import ReadError, is_finite, open_tensors
from tests.checkpoints_convert import originals

pytestmark = pytest.mark.filterwarnings("ignore:(Detected pickle protocol|torch.quantize|TypedStorage):UserWarning")

ODD = torch.tensor([0.0, -0.0, 1.5, float("inf"), float("-inf"), float("nan"), 1e-40, 3e38])  # also a subnormal


def tensors() -> dict[str, torch.Tensor]:
    whole = {"long": torch.arange(-3, 4), "byte": torch.arange(5, dtype=torch.uint8), "flag": torch.tensor([True, False, True])}
    floats = {"single": ODD.reshape(2, 4), "half": ODD.half(), "brain": ODD.bfloat16().reshape(2, 2, 2)}
    return floats | whole | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}


def assert_same(found: np.ndarray, wanted: torch.Tensor) -> None:
    """The same dtype, shape and bits."""
    assert found.dtype.name == str(wanted.dtype).removeprefix("torch.")
    assert found.shape == tuple(wanted.shape) and found.tobytes() == wanted.reshape(-1).view(torch.uint8).numpy().tobytes()


def is_mapped(array: np.ndarray, path: Path) -> bool:
    """Whether an array's memory is pages of a file."""
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [range(*(int(end, 16) for end in line.split("-"))) for line in lines]
    return any(array.__array_interface__["data"][0] in pages for pages in ranges)


def put(path: Path, kind: str, values) -> Path:
    """A file of one of the formats."""
    if kind == "safetensors":
        save_file(values, path)
    else:
        torch.save(values, path, _use_new_zipfile_serialization=kind == "zip")
    return path


FORMATS = {"safetensors": "m.safetensors", "zip": "m.pth", "legacy": "m.bin"}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, kind):
    path = put(tmp_path / FORMATS[kind], kind, tensors())
    found = open_tensors(path)
    assert found.keys() == found.kinds.keys() == tensors().keys() and found.files == [path]
    for key, wanted in tensors().items():
        assert found.kinds[key] == (found[key].dtype, found[key].shape), key
        assert_same(found[key], wanted)
        if wanted.numel():
            assert is_mapped(found[key], path) == (kind != "legacy"), key
            assert kind != "safetensors" or isinstance(found[key], np.memmap)


def test_a_header_of_odd_length_leaves_tensors_unaligned(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}, "__metadata__": {"x": "y"}}).encode()
    header += b" " * (1 - len(header) % 2)
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + ODD.numpy().tobytes())
    found = open_tensors(tmp_path / "m.safetensors")["a"]
    assert_same(found, ODD)
    assert not is_finite(found) and is_finite(found[:3])


def test_the_first_bytes_tell_the_format_and_not_the_name(tmp_path):
    assert_same(open_tensors(put(tmp_path / "m.bin", "safetensors", tensors()))["brain"], tensors()["brain"])
    with pytest.raises(ReadError, match=r"m.safetensors: is not a safetensors file, or is truncated; fetch it again"):
        open_tensors(put(tmp_path / "m.safetensors", "zip", tensors()))


def test_views_and_parameters_of_torch_files(tmp_path):
    whole = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    values = {"whole": whole, "turned": whole.t().bfloat16(), "tied": whole}
    found = open_tensors(put(tmp_path / "m.pth", "zip", values))
    assert all(np.array_equal(found[key], value.detach().float()) for key, value in values.items())


@pytest.mark.parametrize("wrap", [
    lambda inner: {"state_dict": inner, "epoch": 3},
    lambda inner: {"model": inner, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}},
    lambda inner: {"module": inner, "step": torch.tensor(7)},
    lambda inner: {"model": {"state_dict": inner}, "optimizer": {}},
    lambda inner: inner | {"iteration": 5, 3: torch.zeros(1)},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_wrappers_of_training_code(tmp_path, kind, wrap):
    found = open_tensors(put(tmp_path / "m.pth", kind, wrap({"a": ODD, "b": torch.ones(2)})))
    assert sorted(found) == ["a", "b"]
    assert_same(found["a"], ODD)


# --- folders


def test_a_folder_in_shards(tmp_path):
    originals.put_tensors(tmp_path / "m", tensors(), shards=3)
    put(tmp_path / "m" / "pytorch_model.bin", "zip", {"other": ODD})
    found = open_tensors(tmp_path / "m")
    assert found.keys() == tensors().keys() and len(found.files) == 3
    assert_same(found["half"], tensors()["half"])


@pytest.mark.parametrize("first, second", [
    ("model.safetensors", "pytorch_model.bin"), ("adapter_model.safetensors", "adapter_model.bin"),
    ("pytorch_model.bin", "training_args.pt"), ("b.safetensors", "a.bin"), ("a.bin", "z.pth"),
])  # fmt: skip
def test_the_first_format_counts_where_there_are_two(tmp_path, first, second):
    for name in (first, second):
        put(tmp_path / name, "safetensors" if name.endswith("safetensors") else "zip", {name: ODD})
    assert list(open_tensors(tmp_path)) == [first]


def test_a_folder_of_shards_without_an_index(tmp_path):
    """What DeepSpeed's zero_to_fp32 leaves."""
    for i in range(3):
        put(tmp_path / f"pytorch_model-{i + 1:05}-of-00003.bin", "zip", {f"layers.{i}": ODD + i, "tied": ODD})
    found = open_tensors(tmp_path)
    assert sorted(found) == ["layers.0", "layers.1", "layers.2", "tied"] and is_finite(found["layers.2"][:3])


@pytest.mark.parametrize("other", [ODD.flip(0), ODD[:4], -ODD, ODD.double(), ODD.reshape(2, 4), ODD.clone().view(torch.int32)])
def test_one_name_with_two_values_is_refused(tmp_path, other):
    put(tmp_path / "a.bin", "zip", {"x": ODD, "y": ODD})
    put(tmp_path / "b.bin", "legacy", {"x": other, "z": ODD})
    with pytest.raises(ReadError, match=r"b.bin: has other values of x than .*a.bin; give one checkpoint"):
        open_tensors(tmp_path)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("change, said", [
    (lambda homes: homes.pop("brain"), rf"brain \(index: None, files: {FIRST}\)"),
    (lambda homes: homes.update(new=FIRST), rf"new \(index: {FIRST}, files: None\)"),
    (lambda homes: homes.update(single=SECOND), rf"single \(index: {SECOND}, files: {FIRST}\)"),
])  # fmt: skip
def test_an_index_that_does_not_fit_its_shards(tmp_path, change, said):
    originals.put_tensors(tmp_path, tensors(), shards=2)
    path = tmp_path / "model.safetensors.index.json"
    homes = json.loads(path.read_text())["weight_map"]
    change(homes)
    path.write_text(json.dumps({"weight_map": homes}))
    with pytest.raises(ReadError, match=rf"^{path}: does not fit its shards in 1 tensors: {said}; fetch the folder again$"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("content, said", [
    ({"weight_map": {"a": "a.bin", "b": "b.bin", "c": "c.bin"}}, "lists b.bin, c.bin, which do not exist; fetch the missing shards"),
    ({"weight_map": {"a": 5}}, "lists 5, which do not exist; fetch the missing shards"),
    ({"weight_map": ["a.bin"]}, r"is not an index of shards \(no weight_map\); fetch it again"),
    ('{"weight_map": {"a', r"is not an index of shards \(no weight_map\); fetch it again"),
])  # fmt: skip
def test_an_index_that_is_none_or_whose_shards_are_not_there(tmp_path, content, said):
    put(tmp_path / "a.bin", "zip", {"a": ODD})
    path = tmp_path / "pytorch_model.bin.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ReadError, match=f"^{path}: {said}$"):
        open_tensors(tmp_path)


# --- damage


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.003, 0.01, 0.1, 0.3, 0.9, 0.999])
def test_truncated(tmp_path, kind, share):
    path = put(tmp_path / FORMATS[kind], kind, tensors() | {"much": torch.ones(2000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ReadError, match=rf"^{path}: is .*truncated.*fetch it again$"):
        open_tensors(path)


@settings(max_examples=200)
@given(data=st.data())
@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_is_damaged_ends_in_one_message(tmp_path_factory, kind, data):
    """Bytes changed anywhere, and the rest cut off: either it is refused, or it can be read."""
    path = put(tmp_path_factory.getbasetemp() / FORMATS[kind], kind, tensors())
    content = bytearray(path.read_bytes())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=3)):
        content[at] = value
    path.write_bytes(content[: data.draw(st.integers(0, 2 * len(content)))])
    try:
        list(open_tensors(path).values())
    except ReadError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and "\x1b" not in str(error)


@pytest.mark.parametrize("at", [0, 3, 7, 9, 40])
def test_a_changed_byte_in_the_header_of_safetensors(tmp_path, at):
    path = put(tmp_path / "m.safetensors", "safetensors", tensors())
    content = bytearray(path.read_bytes())
    content[at] ^= 0x80
    path.write_bytes(content)
    with pytest.raises(ReadError, match=rf"^{path}: is truncated or damaged \(.*\); fetch it again$"):
        open_tensors(path)


class Code(str):
    """Makes a folder of this name when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("place", ["alone", "beside tensors", "object"])
def test_code_in_a_torch_file_is_not_run(tmp_path, kind, place):
    code = Code(tmp_path / "marker")
    content = {"alone": code, "beside tensors": {"a": ODD, "x": code}, "object": torch.nn.Linear(2, 2)}[place]
    named = "torch.nn.modules.linear.Linear" if place == "object" else "posix.mkdir"
    with pytest.raises(ReadError, match=rf"m.pth: contains code or objects .*\({named}\), which are not executed; .* as safetensors$"):
        open_tensors(put(tmp_path / "m.pth", kind, content))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_code_in_a_plain_pickle_is_not_run(tmp_path, protocol):
    (tmp_path / "m.bin").write_bytes(pickle.dumps({"x": Code(tmp_path / "marker")}, protocol))
    with pytest.raises(ReadError, match="m.bin: (contains code|is not a file of tensors)"):
        open_tensors(tmp_path / "m.bin")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kind, value, said", [
    ("safetensors", torch.ones(4).to(torch.float8_e4m3fn), "has tensors of type F8_E4M3; quantized weights"),
    ("zip", torch.ones(4).to(torch.float8_e5m2), r"x is torch.float8_e5m2, .*; quantized and sparse weights cannot be converted"),
    ("zip", torch.eye(3).to_sparse(), "x is torch.float32, torch.sparse_coo"),
    ("zip", torch.ones(2, dtype=torch.complex64), "x is torch.complex64"),
    ("zip", "quantised", "x is torch.quint8"),
])  # fmt: skip
def test_quantised_sparse_and_unknown_types(tmp_path, kind, value, said):
    value = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8) if isinstance(value, str) else value
    with pytest.raises(ReadError, match=rf"{FORMATS[kind]}: {said}"):
        open_tensors(put(tmp_path / FORMATS[kind], kind, {"x": value}))


@pytest.mark.parametrize("name, content, said", [
    ("m.bin", b"version https://git-lfs.github.com/spec/v1\n", "is not a file of tensors, or is truncated or damaged"),
    ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is not a safetensors file, or is truncated; fetch it again"),
    ("m.pth", b"", "is not a file of tensors, or is truncated or damaged .*; fetch it again"),
    ("none", None, "no such file or folder; give the path of a checkpoint$"),
    ("readme.md", b"# Weights", r"has no weights \(\*.safetensors, \*.bin, \*.pth, \*.pt, \*.gguf\)"),
])  # fmt: skip
def test_what_is_no_file_of_tensors(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    place = tmp_path if name == "readme.md" else tmp_path / name
    with pytest.raises(ReadError, match=rf"^{place}: {said}"):
        open_tensors(place)


@pytest.mark.parametrize("content", [torch.zeros(2), [torch.zeros(2)], {}, {"epoch": 3}, {"model": {"epoch": 3}}])
def test_a_torch_file_without_names(tmp_path, content):
    with pytest.raises(ReadError, match="m.pth: has no named tensors; give a file with a state_dict"):
        open_tensors(put(tmp_path / "m.pth", "zip", content))


# --- values

KINDS = {np.float16: np.uint16, ml_dtypes.bfloat16: np.uint16, np.float32: np.uint32, np.float64: np.uint64}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_is_finite_as_numpy_says(kind, data):
    """Over every pattern of bits: NaN of any payload, Inf, subnormals, zeros of both signs."""
    bits, info = KINDS[kind], ml_dtypes.finfo(kind)
    special = [info.max, info.min, info.smallest_subnormal, info.tiny, -0.0, np.inf, -np.inf, np.nan]
    one = st.one_of(st.integers(0, np.iinfo(bits).max), st.sampled_from(np.array(special, kind).view(bits).tolist()))
    values = np.array(data.draw(st.lists(one, max_size=6)), bits).view(kind)
    for array in (values, values[::-1], values[None].T, np.broadcast_to(values, (2, len(values)))):
        assert is_finite(array) == bool(np.isfinite(array).all())


@pytest.mark.parametrize("kind", KINDS)
def test_is_finite_looks_at_every_run(monkeypatch, kind):
    monkeypatch.setattr(readers, "_SCAN_CHUNK", 4)
    for at in range(11):
        values = np.ones(11, kind)
        assert is_finite(values) and is_finite(values[at])
        values[at] = np.nan
        assert not is_finite(values) and not is_finite(values[at])
    assert all(is_finite(np.array([-1, 0, 1]).astype(whole)) for whole in (np.int64, np.uint8, np.bool_))
