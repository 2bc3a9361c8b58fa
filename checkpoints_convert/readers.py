"""Readers of tensor files: safetensors and torch files of plain tensors are memory-mapped, other torch files are only loaded with
`torch.load(weights_only=True, mmap=True)`, GGUF files are read by `gguf_file`.

tensors = open_tensors("vicuna-7b-v1.5")      # a file or a folder, with one file or shards
tensors.kinds["lm_head.weight"]               # (dtype, shape), from the headers alone
tensors["lm_head.weight"]                     # an array, memory-mapped if possible
"""

from __future__ import annotations

import errno
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from checkpoints_convert import gguf_file, torch_zip
from mimo_jax.errors import UserError


class ReadError(UserError):
    """A file of tensors that cannot be read, or whose content contradicts its index; the message names it."""


_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
# File names of weights in a folder; the first that exists is used, because repositories often have them in two formats.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
_WRAPPERS = ("state_dict", "model", "module")  # keys under which training code stores the tensors in a file
_SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_TORCH_DTYPES = {*(np.dtype(kind).name for kind in _SAFETENSORS_DTYPES.values())}


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, from one or several files. kinds: {name: (dtype, shape)}; files: the files in order."""

    def __init__(self, shards: Mapping[Path, _Shard]):
        self.files = list(shards)
        self._shards = shards
        self._homes: dict[str, Path] = {}
        for path, shard in shards.items():
            for key, kind in shard.kinds.items():
                home = self._homes.setdefault(key, path)
                if home != path and (kind != shards[home].kinds[key] or not np.array_equal(_bits(shard.read(key)), _bits(self[key]))):
                    raise ReadError(f"{path}: has other values of {key} than {home}; give one checkpoint")
        self.kinds = {key: shards[home].kinds[key] for key, home in self._homes.items()}

    def __getitem__(self, key: str) -> np.ndarray:
        return self._shards[self._homes[key]].read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


class _Shard(Protocol):
    """Interface of one file. kinds: {name: (dtype, shape)}; read: returns a tensor by name."""

    kinds: dict[str, tuple[np.dtype, tuple[int, ...]]]

    def read(self, key: str) -> np.ndarray: ...


class _Safetensors:
    """Memory-mapped tensors of a safetensors file. The library checks that the header is complete and covers the file."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy"):
                pass
        except SafetensorError as error:
            raise ReadError(f"{path}: is truncated or damaged ({error}); fetch it again") from None
        self.path = path
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        unknown = sorted({entry["dtype"] for entry in header.values()} - _SAFETENSORS_DTYPES.keys())
        if unknown:
            raise ReadError(f"{path}: has tensors of type {', '.join(unknown)}; quantized weights cannot be converted")
        self.kinds = {k: (np.dtype(_SAFETENSORS_DTYPES[e["dtype"]]), tuple(e["shape"])) for k, e in header.items()}
        self._offsets = {k: 8 + length + e["data_offsets"][0] for k, e in header.items()}

    def read(self, key: str) -> np.ndarray:
        dtype, shape = self.kinds[key]
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(self.path, dtype, "r", self._offsets[key], shape or (1,)).reshape(shape)


class _TorchZip:
    """Tensors of a torch file that were read without torch."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self._tensors = tensors
        self.kinds = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}

    def read(self, key: str) -> np.ndarray:
        return self._tensors[key]


class _Torch:
    """Tensors of another torch file, which only torch can read; files in the zip format are memory-mapped."""

    def __init__(self, path: Path):
        try:
            import torch
        except ImportError:
            missing = 'only torch can read this file, but it is not installed; pip install "mimo_jax[convert]"'
            raise ReadError(f"{path}: {missing}") from None
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # damaged bytes make the unpickler raise almost any type of exception
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)):
                raise
            raise ReadError(f"{path}: {_describe_error(error)}") from None
        self._tensors = _unwrapped(path, loaded, torch.Tensor)
        self.kinds = {}
        for key, tensor in self._tensors.items():
            dense = tensor.layout == torch.strided and not tensor.is_quantized
            if not dense or str(tensor.dtype).removeprefix("torch.") not in _TORCH_DTYPES:
                raise ReadError(f"{path}: {key} is {tensor.dtype}, {tensor.layout}; quantized and sparse weights cannot be converted")
            self.kinds[key] = (_torch_array(tensor[:0] if tensor.ndim else tensor).dtype, tuple(tensor.shape))

    def read(self, key: str) -> np.ndarray:
        return _torch_array(self._tensors[key])


def _describe_error(error: Exception) -> str:
    """The error message for a file that torch refuses; torch's own message suggests to execute the code in the file."""
    message = str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip()
    named = re.search(r"(?:GLOBAL|function|but got) (\w+(?:\.\w+)+) ", f"{message} ") if isinstance(error, pickle.UnpicklingError) else None
    if named:
        return f"contains code or objects ({named[1]}), which are not executed; if you trust it, save its state_dict as safetensors"
    reason = "".join(c for c in f"{type(error).__name__} {message}".splitlines()[0][:120] if c.isprintable()).strip()
    return f"is not a file of tensors, or is truncated or damaged ({reason}); fetch it again"


def _torch_array(tensor: Any) -> np.ndarray:
    """A torch tensor as an array over the same memory."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _unwrapped(path: Path, loaded: Any, tensor: type) -> dict[str, Any]:
    """The tensors in the content of a file: a dict of them, or such a dict under a common key, next to optimizer states and counters."""
    for _ in range(2):
        inner = [loaded[name] for name in _WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(name), dict)]
        loaded = inner[0] if inner else loaded
    found = loaded.items() if isinstance(loaded, dict) else ()
    tensors = {key: value for key, value in found if isinstance(key, str) and isinstance(value, tensor)}
    if tensors:
        return tensors
    raise ReadError(f"{path}: has no named tensors; give a file with a state_dict")


def _open(path: Path) -> _Shard:
    """Open one file; its first bytes determine the format."""
    with open(path, "rb") as file:
        start = file.read(9)
    if len(start) == 9 and start[8:] == b"{" and start[:4] != b"PK\x03\x04":
        return _Safetensors(path)
    if start.startswith(gguf_file.MAGIC) or path.suffix == ".gguf":
        return gguf_file.open_gguf(path)
    if path.suffix == ".safetensors":
        raise ReadError(f"{path}: is not a safetensors file, or is truncated; fetch it again")
    plain = torch_zip.load(path)
    return _Torch(path) if plain is None else _TorchZip(_unwrapped(path, plain, np.ndarray))


def open_tensors(path: str | Path) -> Tensors:
    """The tensors of a file, or of a folder: from its shards with an index, from its single file, or else from all its weight files."""
    path = Path(path)
    if not path.exists():
        raise ReadError(f"{path}: no such file or folder; give the path of a checkpoint")
    if path.is_file():
        return Tensors({path: _open(path)})
    for name in _INDEXES:
        if (path / name).is_file():
            return _indexed(path / name)
    for name in _WHOLE:
        if (path / name).is_file():
            return Tensors({path / name: _open(path / name)})
    for suffix in _SUFFIXES:
        files = sorted(path.glob(f"*{suffix}"))
        if files:
            return Tensors({file: _open(file) for file in files})
    if file := gguf_of(path):
        return Tensors({file: _open(file)})
    raise ReadError(f"{path}: has no weights (*{', *'.join(_SUFFIXES)}, *.gguf); give a folder with weights")


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that a folder without other weights has; None if there is none. Raises ReadError for a folder
    with several of them, which are the same model with other quantization."""
    if not path.is_dir():
        return path if gguf_file.is_gguf(path) else None
    if any(file.suffix in _SUFFIXES for file in path.iterdir()):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ReadError(f"{path}: has {len(files)} GGUF files ({', '.join(file.name for file in files[:3])}); name one of them")
    return files[0] if files else None


def _indexed(index: Path) -> Tensors:
    """The shards that an index names; raises ReadError if their tensors are not exactly those of the index."""
    try:
        homes = json.loads(index.read_text())["weight_map"]
        names = sorted({str(name) for name in homes.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ReadError(f"{index}: is not an index of shards (no weight_map); fetch it again") from None
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ReadError(f"{index}: lists {', '.join(absent)}, which do not exist; fetch the missing shards")
    shards = {index.parent / name: _open(index.parent / name) for name in names}
    found = {key: path.name for path, shard in shards.items() for key in shard.kinds}
    wrong = sorted(key for key in homes.keys() | found.keys() if homes.get(key) != found.get(key))
    if wrong:
        shown = ", ".join(f"{key} (index: {homes.get(key)}, files: {found.get(key)})" for key in wrong[:6])
        raise ReadError(f"{index}: does not fit its shards in {len(wrong)} tensors: {shown}; fetch the folder again")
    return Tensors(shards)


# --- values


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


_EXPONENTS = {"float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80), "float32": (np.uint32, 0x7F800000)}
_SCAN_CHUNK = 2**20  # values checked at a time


def is_finite(array: np.ndarray) -> bool:
    """Whether an array has no NaN or Inf, that is, no value whose exponent bits are all ones."""
    if array.dtype.name not in _EXPONENTS:
        return array.dtype.kind != "f" or bool(np.isfinite(array).all())
    kind, mask = _EXPONENTS[array.dtype.name]
    bits = np.ascontiguousarray(array).reshape(-1).view(kind)
    masked = np.empty(min(_SCAN_CHUNK, bits.size), kind)
    for at in range(0, bits.size, _SCAN_CHUNK):
        run = bits[at : at + _SCAN_CHUNK]
        if np.bitwise_and(run, kind(mask), out=masked[: run.size]).max(initial=0) == mask:
            return False
    return True
