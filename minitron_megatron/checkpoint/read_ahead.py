"""Reading ahead: a thread fetches what comes next while this one works on what is there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from minitron_megatron.checkpoint.slabs import AHEAD_BYTES, Slab


def read_ahead(slabs: Iterable[Slab], read: Callable[[Slab], Tensor], ahead_bytes: int | None = None) -> Generator[tuple[Slab, Tensor], None, None]:
    """Each slab with its tensor, in order; the reader is at most ahead_bytes ahead, but never less than one slab.

    What read raises is raised here, when its slab's turn comes. Nothing is read any more once the iterator is closed.
    """
    limit = AHEAD_BYTES if ahead_bytes is None else ahead_bytes
    upcoming, waiting, ahead = iter(slabs), deque[tuple[Slab, Future[Tensor]]](), 0
    reader = ThreadPoolExecutor(1, "read-ahead")
    try:
        slab = next(upcoming, None)
        while slab is not None or waiting:
            while slab is not None and (not waiting or ahead - waiting[0][0].nbytes < limit):
                waiting.append((slab, reader.submit(read, slab)))
                ahead += slab.nbytes
                slab = next(upcoming, None)
            first, future = waiting.popleft()
            tensor = future.result()
            ahead -= first.nbytes
            del future  # it would keep the tensor beyond its turn
            yield first, tensor
            del tensor
    finally:
        reader.shutdown(wait=True, cancel_futures=True)
