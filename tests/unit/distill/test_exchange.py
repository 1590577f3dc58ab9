"""Who sends which rows to whom: every row of a wanted state arrives exactly once, from a rank that holds it."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minitron_megatron.distill.exchange import Exchange, Route, rows_of_rank
from minitron_megatron.parallel.layout import Layout, Place

SIZES = [(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]  # tensor, pipeline, data: four processes


def layout(sizes: tuple[int, int, int], *, sequence_parallel: bool = False, context: int = 1) -> Layout:
    tensor, pipeline, data = sizes
    groups: Any = None
    return Layout(tensor, pipeline, data, sequence_parallel and tensor > 1, "cost", groups, context=context)


def exchange(teacher: Layout, student: Layout, rank: int = 0) -> Exchange:
    group: Any = SimpleNamespace(rank=lambda: rank)
    return Exchange(teacher, student, group, torch.device("cpu"))


# sequence parallel needs lengths that the teacher's tensor ranks divide: the recipe's checks refuse others
CASES = [
    (teacher, student, sequence, sharded, context)
    for teacher, student, (sequence, context), sharded in product(SIZES, SIZES, ((16, 1), (12, 1), (15, 1), (3, 1), (12, 2)), (False, True))
    if not sharded or sequence % teacher[0] == 0
]


@pytest.mark.parametrize(("teacher", "student", "sequence", "teacher_sequence", "context"), CASES)
def test_every_row_arrives_once_from_a_rank_that_holds_it(
    teacher: tuple[int, int, int], student: tuple[int, int, int], sequence: int, teacher_sequence: bool, context: int
) -> None:
    """sequence: of one context rank."""
    own, wanting = layout(teacher, sequence_parallel=teacher_sequence, context=context), layout(student, context=context)
    width = rows_of_rank(sequence, wanting.tensor)
    for number, source, target, part in product(range(5), range(own.pipeline), range(wanting.pipeline), range(context)):
        seen: dict[int, list[int]] = {}
        for piece in exchange(own, wanting).pieces(Route("state", source, target, part), number, sequence):
            sender, receiver = place_of(own, piece.source), place_of(wanting, piece.target)
            assert (sender.stage, sender.data, sender.context) == (source, number % own.data, part)
            assert (receiver.stage, receiver.data, receiver.context) == (target, number % wanting.data, part)
            assert len(piece.source_rows) == len(piece.target_rows) > 0
            first = sender.tensor * (sequence // own.tensor) if own.sequence_parallel else 0
            rows = [first + row for row in piece.source_rows]
            assert rows == [receiver.tensor * width + row for row in piece.target_rows]
            seen.setdefault(receiver.tensor, []).extend(rows)
        arrived = sorted(row for rows in seen.values() for row in rows)
        assert arrived == list(range(sequence))


def place_of(where: Layout, rank: int) -> Place:
    """By hand: tensor is the fastest, then context, then data, then pipeline."""
    model = where.tensor * where.context
    return Place(rank % where.tensor, rank // model % where.data, rank // (model * where.data), rank // where.tensor % where.context)


@pytest.mark.parametrize(("teacher", "student"), product(SIZES, SIZES))
def test_a_rank_takes_part_where_its_teacher_makes_a_state_or_its_student_wants_it(
    teacher: tuple[int, int, int], student: tuple[int, int, int]
) -> None:
    """And so in all that it sends, receives or copies: the others' states cost it nothing."""
    own, wanting = layout(teacher, context=2), layout(student, context=2)
    for rank, number, source, target, part in product(range(8), range(5), range(own.pipeline), range(wanting.pipeline), range(2)):
        route, made, wanted = Route("state", source, target, part), place_of(own, rank), place_of(wanting, rank)
        makes = (made.stage, made.data, made.context) == (source, number % own.data, part)
        expected = makes or (wanted.stage, wanted.data, wanted.context) == (target, number % wanting.data, part)
        one = exchange(own, wanting, rank)
        assert one._takes_part(route, number) == expected
        assert expected or all(rank not in (piece.source, piece.target) for piece in one.pieces(route, number, 16))


@pytest.mark.parametrize("sizes", SIZES)
def test_the_same_layout_moves_nothing_when_the_stages_are_the_same(sizes: tuple[int, int, int]) -> None:
    one = layout(sizes)
    for number, stage in product(range(5), range(one.pipeline)):
        assert exchange(one, one).stays(Route("state", stage, stage), number)
        for other in set(range(one.pipeline)) - {stage}:
            assert not exchange(one, one).stays(Route("state", stage, other), number)


def test_whole_states_are_taken_from_the_rank_itself_where_it_has_them() -> None:
    """Teacher on four tensor ranks without sequence parallelism, student a pipeline: its last stage has every state already."""
    moves = list(exchange(layout((4, 1, 1)), layout((1, 4, 1))).pieces(Route("state", 0, 3), 0, 16))
    assert [(piece.source, piece.target) for piece in moves] == [(3, 3)]


def test_a_state_that_must_travel_is_spread_over_the_ranks_that_hold_it() -> None:
    moves = list(exchange(layout((2, 2, 1)), layout((2, 2, 1))).pieces(Route("state", 0, 1), 0, 16))
    assert [(piece.source, piece.target, len(piece.source_rows)) for piece in moves] == [(0, 2, 8), (1, 3, 8)]
