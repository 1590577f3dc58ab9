"""The digest of a checkpoint's weights: of its tensors' digests, so that several processes can each take a part of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from minitron_megatron.checkpoint.file_bytes import bytes_of
from minitron_megatron.checkpoint.slabs import Slab


class Digests:
    """sha256 of each tensor's name, type, shape and bytes, from its slabs in order, by a thread of its own: hashlib lets others run meanwhile."""

    def __init__(self) -> None:
        self._hashes: dict[str, hashlib._Hash] = {}
        self._thread = ThreadPoolExecutor(1, "digest")
        self._last: Future[None] | None = None

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def add(self, slab: Slab, tensor: Tensor) -> None:
        """Takes a contiguous tensor on the CPU; waits for the slab before it, so that at most two are held."""
        self._wait()
        name = slab.row.name
        if name not in self._hashes:
            self._hashes[name] = hashlib.sha256(f"{name} {slab.dtype} {list(slab.shape)}".encode())
        self._last = self._thread.submit(self._hashes[name].update, bytes_of(tensor))

    def all(self) -> dict[str, bytes]:
        """Name of a tensor → its digest."""
        self._wait()
        return {name: digest.digest() for name, digest in self._hashes.items()}

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()
        self._last = None


def combined_digest(digests: Iterable[bytes]) -> str:
    """sha256 over the digests of all tensors, in the order of the table of tensors."""
    return hashlib.sha256(b"".join(digests)).hexdigest()
