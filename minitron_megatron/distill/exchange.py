"""The teacher's states, from the ranks that made them to the ranks that hold the student against them: each state exactly once.

Teacher and student may have different tensor, pipeline and data-parallel sizes on the same ranks. A state of a micro-batch lies on the
teacher's stage that made it, whole on every tensor rank or sharded along the sequence; it is wanted on one of the student's stages, on
the data-parallel rank that trains on the micro-batch, sharded along the sequence over its tensor ranks. Where that is where it lies, it
stays. Context ranks, as many in both layouts, have the same tokens of a sample in both: such a state is of one context rank's tokens, and
goes to the student's context rank of the same number. Everything is known on every rank from the sample ids alone, so all sends and receives
are posted in one global order.

Legend: S sequence, or what a context rank has of it, s this rank's part of it, B samples of a micro-batch, E teacher's hidden.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from minitron_megatron.data.batches import MicroBatches
from minitron_megatron.distill.handover import HandoverStore, Held
from minitron_megatron.parallel.layout import Layout, Place

StateKey = tuple[Hashable, tuple[int, ...]]
"""What the state is, sample ids of the micro-batch."""


@dataclass(frozen=True)
class Route:
    """A kind of state, the teacher's stage that makes it and the student's stage that wants it."""

    name: Hashable
    source_stage: int
    target_stage: int
    context: int = 0
    """Of which context rank's tokens."""


@dataclass(frozen=True)
class Piece:
    """Rows of the sequence that go from one rank to another; both ranges count from the first row that the rank holds."""

    source: int
    target: int
    source_rows: range
    target_rows: range


@dataclass(frozen=True)
class StateShape:
    """Of one micro-batch's state."""

    sequence: int
    samples: int
    hidden: int
    dtype: torch.dtype


class Exchange:
    """Moves states between two layouts over the same ranks, in a process group of its own."""

    def __init__(self, teacher: Layout, student: Layout, group: dist.ProcessGroup, device: torch.device) -> None:
        self.teacher, self.student = teacher, student
        self._group, self._device, self._rank = group, device, group.rank()
        self._in_teacher, self._in_student = teacher.place_of(self._rank), student.place_of(self._rank)
        self._leaving: list[tuple[dist.Work, torch.Tensor]] = []
        """Sends under way, and what they send."""
        self.bytes_sent = 0
        self.bytes_kept = 0
        """Of states, or parts of them, that were on the right rank already."""

    def run(self, routes: list[Route], groups: MicroBatches, made: HandoverStore, wanted: HandoverStore, shape: StateShape) -> None:
        """Empties the store of what this rank's teacher made into the store of what its student wants; every process calls this.

        A round takes as many micro-batches as the layout with more data-parallel ranks works on at a time, so that memory holds
        one round of states twice at most. What this rank sends may still be on its way when this returns: a rank that only gives goes on
        with its student while the others are at their teacher. Whoever drops this object ahead of the step's end would take it back.
        """
        self._wait_for_sends()
        together = max(self.teacher.data, self.student.data)
        routes = [replace(route, context=context) for route in routes for context in range(self.student.context)]
        for first in range(0, len(groups), together):
            numbers = range(first, min(first + together, len(groups)))
            self._round([(route, number, groups[number]) for number in numbers for route in routes], made, wanted, shape)

    def stays(self, route: Route, number: int) -> bool:
        """Whether each tensor rank of the student finds the state where the teacher's tensor rank of the same number left it."""
        if self.teacher.tensor != self.student.tensor:
            return False
        return all(self._source(route, number, rank) == self._target(route, number, rank) for rank in range(self.student.tensor))

    def pieces(self, route: Route, number: int, sequence: int) -> Iterator[Piece]:
        """What travels, or is copied within a rank, of the state of the micro-batch with this number."""
        width = rows_of_rank(sequence, self.student.tensor)
        for tensor in range(self.student.tensor):
            target = self._target(route, number, tensor)
            rows = range(min(tensor * width, sequence), min((tensor + 1) * width, sequence))
            for source, first, part in self._holders(route, number, rows, target, sequence):
                yield Piece(source, target, range(part.start - first, part.stop - first), range(part.start - rows.start, part.stop - rows.start))

    def _round(self, items: list[tuple[Route, int, tuple[int, ...]]], made: HandoverStore, wanted: HandoverStore, shape: StateShape) -> None:
        moves: list[dist.P2POp] = []
        arriving: list[tuple[StateKey, Held]] = []
        for route, number, ids in items:
            if not self._takes_part(route, number):
                continue
            key = route.name, ids
            if self.stays(route, number):
                self._keep(key, route, number, made, wanted)
                continue
            pieces = list(self.pieces(route, number, shape.sequence))
            source = made.take(key).states if self._makes(key, route, pieces, made) else None
            arrived = self._post(moves, source, pieces, shape)
            if arrived is not None:
                arriving.append((key, arrived))
        self._start(moves)
        for key, held in arriving:
            wanted.put(key, held)

    def _takes_part(self, route: Route, number: int) -> bool:
        """Whether the state is made or wanted here: of hundreds of data-parallel ranks, which all know of all states, most do neither."""
        made, wanted = self._in_teacher, self._in_student
        if (made.stage, made.data, made.context) == (route.source_stage, number % self.teacher.data, route.context):
            return True
        return (wanted.stage, wanted.data, wanted.context) == (route.target_stage, number % self.student.data, route.context)

    def _start(self, moves: list[dist.P2POp]) -> None:
        """Waits for what arrives. NCCL has one work for all moves, and its wait holds up no host."""
        works = dist.batch_isend_irecv(moves) if moves else []
        for number, work in enumerate(works):
            if len(works) == len(moves) and moves[number].op is dist.isend:
                self._leaving.append((work, moves[number].tensor))
            else:
                work.wait()

    def _wait_for_sends(self) -> None:
        """Those of the step before, all through by its end; gloo says so only where it is waited for."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving = []

    def _keep(self, key: StateKey, route: Route, number: int, made: HandoverStore, wanted: HandoverStore) -> None:
        """The same storage, under the student's name for it."""
        if self._rank not in (self._target(route, number, tensor) for tensor in range(self.student.tensor)):
            return
        held = made.take(key)
        if held.sharded or self.student.place.tensor == 0:
            self.bytes_kept += held.states.nbytes
        wanted.put(key, held)

    def _post(self, moves: list[dist.P2POp], source: torch.Tensor | None, pieces: list[Piece], shape: StateShape) -> Held | None:
        """Adds this rank's sends and receives of one state, makes its local copies; what arrives here, once the moves are done.

        source: what this rank made of it.
        """
        target = None
        if any(piece.target == self._rank for piece in pieces):
            rows = rows_of_rank(shape.sequence, self.student.tensor)
            target = torch.zeros(rows, shape.samples, shape.hidden, dtype=shape.dtype, device=self._device)
        for piece in pieces:
            part = source[piece.source_rows.start : piece.source_rows.stop] if source is not None and piece.source == self._rank else None
            place = target[piece.target_rows.start : piece.target_rows.stop] if target is not None and piece.target == self._rank else None
            if part is not None and place is not None:
                place.copy_(part)
                self.bytes_kept += part.nbytes
            elif part is not None:
                moves.append(dist.P2POp(dist.isend, part.contiguous(), piece.target, self._group))
                self.bytes_sent += part.nbytes
            elif place is not None:
                moves.append(dist.P2POp(dist.irecv, place, piece.source, self._group))
        return None if target is None else Held(target, sharded=self.student.tensor > 1)

    def _makes(self, key: StateKey, route: Route, pieces: list[Piece], made: HandoverStore) -> bool:
        """Whether this rank made the state; one that is not asked for it (its tensor ranks hold the same) forgets it."""
        if key not in made or route.context != self._in_teacher.context:
            return False
        if all(piece.source != self._rank for piece in pieces):
            made.take(key)
            return False
        return True

    def _holders(self, route: Route, number: int, rows: range, target: int, sequence: int) -> Iterator[tuple[int, int, range]]:
        """(rank, its first row, rows) that together make up the rows; whole states come from the target's own rank where it has them."""
        ranks = [self._source(route, number, tensor) for tensor in range(self.teacher.tensor)]
        if not self.teacher.sequence_parallel:
            # spread over the teacher's tensor ranks, which hold the same
            source = target if target in ranks else ranks[rows.start * len(ranks) // max(sequence, 1) if rows else 0]
            if rows:
                yield source, 0, rows
            return
        width = sequence // self.teacher.tensor
        for tensor, rank in enumerate(ranks):
            part = range(max(rows.start, tensor * width), min(rows.stop, (tensor + 1) * width))
            if part:
                yield rank, tensor * width, part

    def _source(self, route: Route, number: int, tensor: int) -> int:
        return self.teacher.rank_of(Place(tensor, number % self.teacher.data, route.source_stage, route.context))

    def _target(self, route: Route, number: int, tensor: int) -> int:
        return self.student.rank_of(Place(tensor, number % self.student.data, route.target_stage, route.context))


def rows_of_rank(sequence: int, tensor: int) -> int:
    """Rows of the sequence on each tensor rank; the last ones may have less to hold than this."""
    return -(-sequence // tensor)
