"""Where the bytes of a tensor lie that torch.save wrote, so that rows of it are read without the rest; none of its pickle's code is run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

STORAGES = {"BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64}
LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a file in a zip archive: behind 26 bytes the lengths of its name and of its extra field."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose elements lie in a row-major block of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the start of what torch.save wrote."""

    def run(self, starts: Sequence[int], lengths: Sequence[int]) -> int | None:
        """Offset of the first byte of a region whose elements lie behind one another; None for one that is scattered or not all there."""
        if len(lengths) != len(self.shape) or any(first + length > size for first, length, size in zip(starts, lengths, self.shape, strict=True)):
            return None
        strides = _row_major(self.shape)
        apart = next((dim for dim, length in enumerate(lengths) if length != 1), len(self.shape))
        if any(length != size for length, size in zip(lengths[apart + 1 :], self.shape[apart + 1 :], strict=True)):
            return None
        return self.offset + self.dtype.itemsize * sum(start * stride for start, stride in zip(starts, strides, strict=True))


def stored_tensor(file: int, start: int, length: int) -> StoredTensor | None:
    """What torch.save wrote into this part of a file; None for anything but one plain tensor: torch.load knows what to say of that."""
    part = _Part(file, start, length)
    try:
        with zipfile.ZipFile(io.BufferedReader(part)) as archive:
            members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            if archive.read(members["byteorder"]).decode() != sys.byteorder:
                return None
            dtype, key, first, shape, strides = _Tensor(archive.open(members["data.pkl"])).load()
        data = members[f"data/{key}"]
        header = os.pread(file, LOCAL_HEADER.size, start + data.header_offset)
        offset = data.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header)) + first * dtype.itemsize
        is_whole = first >= 0 and data.file_size >= (first + prod(shape)) * dtype.itemsize
    except Exception:  # a damaged pickle may raise anything; torch.load then tells what
        return None
    is_plain = data.compress_type == zipfile.ZIP_STORED and strides == _row_major(shape)
    return StoredTensor(dtype, shape, offset) if is_plain and is_whole else None


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


class _Part(io.RawIOBase):
    """A part of a file as a file, of which nothing is kept."""

    def __init__(self, file: int, start: int, length: int) -> None:
        self._file, self._start, self._length, self._place = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        found = os.pread(self._file, min(len(buffer), max(0, self._length - self._place)), self._start + self._place)
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)


class _Tensor(pickle.Unpickler):
    """A pickled tensor as (type, key of its storage, first element, shape, strides)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, first, shape, strides, *_: (*storage, first, tuple(shape), tuple(strides))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, *_ = pid
        return dtype, key
