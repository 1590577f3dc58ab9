"""The messages that all ranks of an exchange post, brought to each other: whether every one finds its other half, and what then lies where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .cases import Case
from .ranks import Move, Part, value_of

Channel = tuple[int, int, int]
"""Round, sender, receiver: messages of a channel arrive in the order in which they were sent (NCCL has no tags)."""


def delivery_faults(parts: Sequence[Part]) -> tuple[list[str], dict[tuple[int, Any, int], list[float]]]:
    """(what does not match, rows of every state by rank, state and number of the micro-batch once all messages are in)."""
    sends, receives = channels(parts)
    buffers = {(part.rank, held.buffer): list(held.rows) for part in parts for held in part.arrived.values()}
    found = [f"{channel}: nobody waits for what is sent" for channel in sends.keys() - receives.keys()]
    found += [f"{channel}: waits for what nobody sends" for channel in receives.keys() - sends.keys()]
    for channel in sends.keys() & receives.keys():
        if [move.count for move in sends[channel]] != [move.count for move in receives[channel]]:
            found.append(f"{channel}: sends {[move.count for move in sends[channel]]} rows, waits for {[m.count for m in receives[channel]]}")
            continue
        for sent, place in zip(sends[channel], receives[channel], strict=True):
            rows = buffers[channel[2], place.buffer]
            if any(rows[place.first : place.first + place.count]):
                found.append(f"{channel}: rows from {place.first} on come twice")
            rows[place.first : place.first + place.count] = sent.rows
    lie = {(part.rank, *key): buffers[part.rank, held.buffer] for part in parts for key, held in part.arrived.items()}
    return found, lie


def channels(parts: Sequence[Part]) -> tuple[dict[Channel, list[Move]], dict[Channel, list[Move]]]:
    sends: dict[Channel, list[Move]] = defaultdict(list)
    receives: dict[Channel, list[Move]] = defaultdict(list)
    for part in parts:
        for move in part.sends:
            sends[move.round, part.rank, move.peer].append(move)
        for move in part.receives:
            receives[move.round, move.peer, part.rank].append(move)
    return sends, receives


def state_faults(case: Case, parts: Sequence[Part], lie: dict[tuple[int, Any, int], list[float]]) -> list[str]:
    """Each state lies on the ranks of the student that want it, whole or its part of the sequence, and on no other rank."""
    expected: dict[tuple[int, Any, int], list[float]] = {}
    tensor, data = case.parallel.tensor, case.parallel.data
    width = -(-case.sequence // tensor)
    for state, (name, _, stage) in enumerate(parts[0].routes):
        for number in range(case.micro_batches):
            rows = [value_of(state, number, row, case) for row in range(case.sequence)]
            for shard in range(tensor):
                rank = shard + tensor * (number % data + data * stage)  # tensor is the fastest, then data, then pipeline
                held = parts[rank].arrived.get((name, number))
                expected[rank, name, number] = rows[shard * width : (shard + 1) * width] if held and held.is_sharded else rows
    found = [f"{key} is missing" for key in expected.keys() - lie.keys()] + [f"{key} is not wanted" for key in lie.keys() - expected.keys()]
    return found + [f"{key} is not what the teacher made" for key in expected.keys() & lie.keys() if expected[key] != lie[key]]
