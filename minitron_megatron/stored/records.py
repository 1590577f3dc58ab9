"""One sample's distributions ↔ bytes: the K likeliest tokens of each place and the tail's mass, or tokens drawn with their counts.

Legend: S sequence, K classes of one token besides the tail, U the most different tokens drawn at any place, T all that were drawn.
Integers take as many bytes as the vocabulary or the number of draws needs. Each array is stored as planes (all lowest bytes, then the next): high
bytes are nearly constant, and zstandard makes little of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

LEVEL = 3
"""Of zstandard: one thread, so that the same arrays are the same bytes everywhere."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class TopKRecord(NamedTuple):
    """ids_SK int32, likeliest first; ln p in the format's type, off by at most 2^-p of its size (p significant bits: 11, 8, 24)."""

    ids_SK: Tensor
    log_probs_SK: Tensor
    log_tail_S: Tensor
    """ln of what all other tokens have together. Rounded by itself: 1 − Σ of rounded probabilities would lose a small tail."""


class SampleRecord(NamedTuple):
    """ids_SU int32, and counts_SU int32: how often each was drawn, 0 behind the last."""

    ids_SU: Tensor
    counts_SU: Tensor
    entropy_S: Tensor
    """Of the whole distribution, nats, fp32: what makes an estimate of KL out of one of cross-entropy."""


Record = TopKRecord | SampleRecord


@dataclass(frozen=True)
class OutputFormat:
    """How to read the bytes of a record."""

    kind: str
    classes: int
    """K of top_k, draws of sample."""
    vocab: int
    sequence_length: int
    temperature: float
    log_probs: str
    block_samples: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def id_bytes(self) -> int:
        return bytes_for(self.vocab - 1)

    @property
    def raw_bytes_per_token(self) -> float:
        """At most, before compression."""
        if self.kind == "sample":
            return 6 + self.classes * (self.id_bytes + bytes_for(self.classes))
        return (self.classes + 1) * DTYPES[self.log_probs].itemsize + self.classes * self.id_bytes

    def encode(self, record: Record) -> bytes:
        """Compressed; the tensors lie on the CPU."""
        raw = self._encoded_top_k(record) if isinstance(record, TopKRecord) else self._encoded_sample(record)
        return zstandard.ZstdCompressor(level=LEVEL).compress(raw)

    def decode(self, compressed: bytes) -> Record:
        raw = _Planes(zstandard.ZstdDecompressor().decompress(compressed))
        return self._sample(raw) if self.kind == "sample" else self._top_k(raw)

    def _encoded_top_k(self, record: TopKRecord) -> bytes:
        size = DTYPES[self.log_probs].itemsize
        floats = [_bits(log_probs, DTYPES[self.log_probs]) for log_probs in (record.log_probs_SK, record.log_tail_S)]
        return _planes(record.ids_SK.numpy(), self.id_bytes) + b"".join(_planes(bits, size) for bits in floats)

    def _top_k(self, raw: _Planes) -> TopKRecord:
        places, dtype = self.sequence_length, DTYPES[self.log_probs]
        ids = raw.integers(places * self.classes, self.id_bytes)
        log_probs, tails = (_floats(raw.bits(count, dtype.itemsize), dtype) for count in (places * self.classes, places))
        return TopKRecord(torch.from_numpy(ids).view(places, -1), log_probs.view(places, -1), tails)

    def _encoded_sample(self, record: SampleRecord) -> bytes:
        drawn = record.counts_SU.numpy() > 0
        ids_T, counts_T = record.ids_SU.numpy()[drawn], record.counts_SU.numpy()[drawn]
        head = _planes(drawn.sum(-1).astype("<i4"), 2) + _planes(_bits(record.entropy_S, torch.float32), 4)
        return head + _planes(ids_T, self.id_bytes) + _planes(counts_T, bytes_for(self.classes))

    def _sample(self, raw: _Planes) -> SampleRecord:
        different_S = raw.integers(self.sequence_length, 2)
        entropy = _floats(raw.bits(self.sequence_length, 4), torch.float32)
        drawn = np.arange(different_S.max()) < different_S[:, None]
        found = []
        for size in (self.id_bytes, bytes_for(self.classes)):
            values = np.zeros(drawn.shape, dtype="<i4")
            values[drawn] = raw.integers(int(different_S.sum()), size)
            found.append(torch.from_numpy(values))
        return SampleRecord(found[0], found[1], entropy)


def bytes_for(largest: int) -> int:
    """Whole bytes that hold the integers 0 … largest."""
    return max(1, -(-largest.bit_length() // 8))


def _planes(values: NDArray[Any], size: int) -> bytes:
    """The lowest `size` bytes of each little-endian value, lowest plane first."""
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little.reshape(-1, 1).view(np.uint8)[:, :size].T).tobytes()


class _Planes:
    """Reads planes one after another."""

    def __init__(self, raw: bytes) -> None:
        self._raw, self._place = raw, 0

    def integers(self, count: int, size: int) -> NDArray[np.int32]:
        whole = np.zeros((count, 4), dtype=np.uint8)
        whole[:, :size] = self._take(count, size)
        return whole.view("<i4")[:, 0].astype(np.int32, copy=False)

    def bits(self, count: int, size: int) -> NDArray[Any]:
        return np.ascontiguousarray(self._take(count, size)).view(f"<i{size}")[:, 0]

    def _take(self, count: int, size: int) -> NDArray[np.uint8]:
        found = np.frombuffer(self._raw, np.uint8, count * size, self._place).reshape(size, count).T
        self._place += count * size
        return found


def _bits(values: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """Integers of the same bits: numpy knows no bfloat16."""
    return values.to(dtype).contiguous().view({2: torch.int16, 4: torch.int32}[dtype.itemsize]).numpy()


def _floats(bits: NDArray[Any], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(bits.astype(bits.dtype.newbyteorder("="), copy=False)).view(dtype)
