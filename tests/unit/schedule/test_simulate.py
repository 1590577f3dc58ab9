"""The simulated step against closed forms, and against what no schedule can break."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from minitron_megatron.schedule.simulate import ORDERS, Order, Pass, StageWorks, simulate, step_time

T, F, B = 0.5, 1.0, 2.0


def even(ranks: int) -> StageWorks:
    return StageWorks((T,) * ranks, (F,) * ranks, (B,) * ranks)


@pytest.mark.parametrize("ranks", [2, 3, 8, 16])
@pytest.mark.parametrize("per_rank", [1, 4])
def test_even_stages_take_what_the_closed_forms_say(ranks: int, per_rank: int) -> None:
    """1F1B waits (P − 1) times for one forward and backward; a teacher that runs ahead adds its work alone, one in the schedule waits too."""
    micro_batches = ranks * per_rank
    bubble = (micro_batches + ranks - 1) * (F + B)
    steps = {order: step_time(simulate(even(ranks), micro_batches, order)) for order in ORDERS}
    assert steps["teacher_pipelined"] == pytest.approx(micro_batches * T + bubble)
    assert steps["teacher_on_one_rank"] == pytest.approx(micro_batches * T + bubble)
    assert steps["one_schedule"] == pytest.approx(bubble + (micro_batches + ranks - 1) * T)


def test_a_barrier_between_the_models_would_cost_the_teachers_last_stage_waiting() -> None:
    """The first rank begins with the student while the last one is still at the teacher."""
    timeline = simulate(even(4), 8, "teacher_pipelined")
    assert timeline[Pass("forward", 0, 0)].start == 8 * T < timeline[Pass("teacher", 3, 7)].end


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(5))
def test_every_pass_runs_once_in_its_time_and_after_what_it_needs(order: Order, seed: int) -> None:
    """Uneven stages, micro-batches that the ranks do not divide."""
    dice = random.Random(seed)
    ranks, micro_batches = dice.randint(1, 6), dice.randint(1, 13)
    works = StageWorks(*(tuple(dice.uniform(0.1, 2) for _ in range(ranks)) for _ in range(3)))
    timeline = simulate(works, micro_batches, order)
    teachers = {"teacher_on_one_rank": micro_batches, "teacher_pipelined": micro_batches * ranks, "one_schedule": 0}[order]
    assert len(timeline) == teachers + 2 * ranks * micro_batches
    for rank in range(ranks):
        spans = sorted(span for which, span in timeline.items() if which.rank == rank)
        assert all(before.end <= after.start + 1e-9 for before, after in pairwise(spans))
    for number in range(micro_batches):
        forward = [timeline[Pass("forward", rank, number)] for rank in range(ranks)]
        backward = [timeline[Pass("backward", rank, number)] for rank in reversed(range(ranks))]
        path = [*forward, *backward]
        assert all(before.end <= after.start + 1e-9 for before, after in pairwise(path))
        handed = [span.end for which, span in timeline.items() if which.kind == "teacher" and which.micro_batch == number]
        assert not handed or max(handed) <= forward[-1].start + 1e-9
    busy = sum(span.end - span.start for span in timeline.values())
    assert busy == pytest.approx(works.ideal(micro_batches) * ranks)
    assert step_time(timeline) >= works.ideal(micro_batches) - 1e-9


def test_one_rank_never_waits() -> None:
    for order in ORDERS:
        assert step_time(simulate(even(1), 5, order)) == pytest.approx(even(1).ideal(5))


def test_a_step_without_micro_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="0 micro-batches"):
        simulate(even(2), 0, "one_schedule")
