"""Torch files of plain tensors, memory-mapped and read without torch.

`torch.save` writes a zip file since torch 1.6: a pickle, and one uncompressed entry for the values of each storage. Only the names in
`_Unpickler` are known here, and none of them runs code. Files with anything else, and older ones, are left to torch.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

_STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip
_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name


def load(path: Path) -> Any:
    """The object in a torch file, with arrays over the file's pages in place of tensors. None if it has more than plain tensors in
    containers, or is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            root = name.removesuffix("data.pkl")
            order = f"{root}byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                return None
            with archive.open(name) as content:
                return _Unpickler(content, path, archive, root).load()
    except MemoryError:
        raise
    except Exception:  # damaged bytes make the unpickler raise almost any type of exception
        return None


class _Unpickler(pickle.Unpickler):
    """Makes arrays of tensors. Raises pickle.UnpicklingError for names that it does not know."""

    def __init__(self, content: BinaryIO, path: Path, archive: zipfile.ZipFile, root: str):
        super().__init__(content, encoding="utf-8")
        self._pages, self._archive, self._root = np.memmap(path, np.uint8, "r"), archive, root

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
        }
        if module == "torch" and name in _STORAGES:
            return np.dtype(_STORAGES[name])
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: tuple) -> np.ndarray:
        """The values of a storage, flat: ("storage", dtype, key of its entry, device, number of values)."""
        kind, dtype, key, _, count = pid
        entry = self._archive.getinfo(f"{self._root}data/{key}")
        if kind != "storage" or entry.compress_type != zipfile.ZIP_STORED or entry.file_size < count * dtype.itemsize:
            raise pickle.UnpicklingError(f"storage {key}")
        header = self._pages[entry.header_offset : entry.header_offset + _LOCAL_HEADER]
        name, extra = header[26:30].view("<u2").tolist()
        start = entry.header_offset + _LOCAL_HEADER + name + extra
        return self._pages[start : start + count * dtype.itemsize].view(dtype)


def _tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> np.ndarray:
    """A tensor as a view of its storage. offset, strides: in values."""
    if not math.prod(shape):
        return np.zeros(shape, storage.dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min(offset, *strides, 0) < 0 or last >= len(storage):
        raise pickle.UnpicklingError("a tensor outside of its storage")
    steps = tuple(stride * storage.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


def _parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    return tensor
