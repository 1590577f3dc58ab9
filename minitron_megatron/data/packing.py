"""Which texts share a sample: whole texts, none divided, so that an answer keeps its question."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Rule = Literal["best_fit", "sequential"]


@dataclass(frozen=True)
class Packing:
    """Sample n holds the texts texts[starts[n] : starts[n + 1]], one behind the other."""

    texts: NDArray[np.int64]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def texts_of(self, sample: int) -> NDArray[np.int64]:
        return self.texts[self.starts[sample] : self.starts[sample + 1]]


def pack(texts: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int, rule: Rule) -> Packing:
    """Every text in one sample of at most `capacity` tokens; lengths: of each text, those beyond the capacity are cut to it.

    sequential: in the order given, a new sample where the next text does not fit. best_fit: the longest first, each where the least room
    is left over (best-fit decreasing; n texts take n·log(capacity)).
    """
    cut = np.minimum(lengths, capacity)
    samples = _sequential(cut, capacity) if rule == "sequential" else _best_fit(cut, capacity)
    starts = np.cumsum([0, *map(len, samples)])
    places = np.fromiter((place for sample in samples for place in sample), dtype=np.int64, count=int(starts[-1]))
    return Packing(texts[places], starts)


def _sequential(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    samples: list[list[int]] = []
    room = 0
    for place, length in enumerate(lengths.tolist()):
        if length > room or not samples:
            samples.append([])
            room = capacity
        samples[-1].append(place)
        room -= length
    return samples


def _best_fit(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    samples: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # those that some sample has, ascending
    longest_first: Sequence[int] = np.argsort(-lengths, kind="stable").tolist()
    for place in longest_first:
        length = int(lengths[place])
        found = bisect.bisect_left(rooms, length)
        if found == len(rooms):
            samples.append([])
            sample, room = len(samples) - 1, capacity
        else:
            room = rooms[found]
            sample = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(found)
        samples[sample].append(place)
        left = room - length
        if not with_room[left]:
            bisect.insort(rooms, left)
        with_room[left].append(sample)
    return samples
