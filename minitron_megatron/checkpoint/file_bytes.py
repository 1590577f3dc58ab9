"""Bytes of tensors between files and memory, without a copy in between and without filling the page cache."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
from torch import Tensor

from minitron_megatron.errors import ArtifactError

WORTH_A_CALL = 8 << 20
"""Bytes; norms and other small tensors would each become a write of their own."""


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    memory: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return memory


def read_into(target: Tensor, file: int, offset: int) -> None:
    """Fills a contiguous tensor from a file's bytes at this offset; raises EOFError where the file ends before."""
    memory = bytes_of(target)
    done = 0
    while done < len(memory):
        read = os.preadv(file, [memory[done:]], offset + done)
        if read == 0:
            raise EOFError("the file ends before the tensor does")
        done += read
    if done >= WORTH_A_CALL:
        os.posix_fadvise(file, offset, done, os.POSIX_FADV_DONTNEED)


def write_from(tensor: Tensor, file: int, offset: int) -> None:
    """Writes a contiguous tensor's bytes at this offset of a file."""
    memory = bytes_of(tensor)
    done = 0
    while done < len(memory):
        done += os.pwritev(file, [memory[done:]], offset + done)


def unwritable(path: Path, cause: OSError) -> ArtifactError:
    """What the system said of a file that is being written, as a user's mistake."""
    mend = "free some space" if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "mend this"
    return ArtifactError(f"{path}: cannot be written ({cause.strerror or cause}); {mend}, or set runs=FOLDER on another disk")


class WriteBehind:
    """Has the disk begin with what is written to a file, and the page cache forget what has arrived there.

    Linux writes a file's dirty pages back at once when it is told that nobody needs them, so that the fsync at the end finds little left to
    do; and a cache that does not grow spares the machine the search for free pages, which costs more than the disk.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._written = 0

    def add(self, count: int) -> None:
        """Told of bytes that have been written."""
        self._written += count
        if self._written >= WORTH_A_CALL:
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
            self._written = 0
