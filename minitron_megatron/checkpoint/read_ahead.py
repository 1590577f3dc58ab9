"""Reading ahead: a thread fetches what comes next while this one works on what is there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from minitron_megatron.checkpoint.slabs import AHEAD_BYTES, Slab


def read_ahead(slabs: Iterable[Slab], read: Callable[[Slab], Tensor], ahead_bytes: int | None = None) -> Iterator[tuple[Slab, Tensor]]:
    """Each slab with its tensor, in order; the reader is at most ahead_bytes ahead, but never less than one slab.

    What read raises is raised here, when its slab's turn comes. Nothing is read any more once the iterator is closed.
    """
    limit = AHEAD_BYTES if ahead_bytes is None else ahead_bytes
    upcoming, waiting, ahead = iter(slabs), deque[tuple[Slab, Future[Tensor]]](), 0
    reader = ThreadPoolExecutor(1, "read-ahead")
    try:
        while True:
            while not waiting or ahead < limit:
                slab = next(upcoming, None)
                if slab is None:
                    break
                waiting.append((slab, reader.submit(read, slab)))
                ahead += slab.nbytes
            if not waiting:
                return
            slab, future = waiting.popleft()
            tensor = future.result()
            ahead -= slab.nbytes
            del future  # it would keep the tensor beyond its turn
            yield slab, tensor
            del tensor
    finally:
        reader.shutdown(wait=True, cancel_futures=True)
