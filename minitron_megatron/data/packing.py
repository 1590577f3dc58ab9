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
    order = np.arange(len(cut)) if rule == "sequential" else np.argsort(-cut, kind="stable")
    found = _sequential(cut.tolist(), capacity) if rule == "sequential" else _best_fit(cut[order].tolist(), capacity)
    sample_of = np.asarray(found, dtype=np.int64)
    places = order[np.argsort(sample_of, kind="stable")]
    return Packing(texts[places], np.concatenate([[0], np.cumsum(np.bincount(sample_of))]))


def _sequential(lengths: Sequence[int], capacity: int) -> list[int]:
    """The sample of each text."""
    sample, room, found = -1, -1, []
    for length in lengths:
        if length > room:
            sample, room = sample + 1, capacity
        room -= length
        found.append(sample)
    return found


def _best_fit(lengths: Sequence[int], capacity: int) -> list[int]:
    """The sample of each text; the longest come first."""
    found, samples = [], 0
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # those that some sample has, ascending
    for length in lengths:
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            sample, room = samples, capacity
            samples += 1
        else:
            room = rooms[place]
            sample = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        found.append(sample)
        left = room - length
        if not with_room[left]:
            bisect.insort(rooms, left)
        with_room[left].append(sample)
    return found
