"""The simulated step against closed forms, and against what no schedule can break."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from minitron_megatron.schedule import simulate as simulator
from minitron_megatron.schedule.simulate import ORDERS, Order, Pass, StageWorks, orders_of, simulate, step_time

T, F, B = 0.5, 1.0, 2.0


def even(ranks: int, virtual: int = 1) -> StageWorks:
    """The same work of each rank, whatever the number of its virtual stages."""
    stages = ranks * virtual
    return StageWorks((T,) * ranks, (F / virtual,) * stages, (B / virtual,) * stages)


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


@pytest.mark.parametrize("ranks", [2, 3, 8, 16])
@pytest.mark.parametrize("virtual", [2, 3])
@pytest.mark.parametrize("rounds", [1, 4])
def test_virtual_stages_divide_the_waiting_by_their_number(ranks: int, virtual: int, rounds: int) -> None:
    """arXiv 2104.04473, section 2.2: the bubble is (P − 1)/V times one forward and backward of a rank.

    The last rank of a teacher's pipeline is through with it P − 1 passes after the first; the student's first micro-batch can be there before.
    """
    micro_batches, works = ranks * rounds, even(ranks, virtual)
    step = micro_batches * (T + F + B) + (ranks - 1) / virtual * (F + B)
    assert step_time(simulate(works, micro_batches, "teacher_on_one_rank")) == pytest.approx(step)
    late = (ranks - 1) * max(0.0, T - F / virtual)
    assert step_time(simulate(works, micro_batches, "teacher_pipelined")) == pytest.approx(step + late)


@pytest.mark.parametrize(("ranks", "virtual"), [(2, 2), (3, 2), (4, 3)])
def test_the_interleaved_order_is_megatrons(ranks: int, virtual: int) -> None:
    """Forward passes of every rank in the order of its schedule table, backward with the chunks reversed."""
    timeline = simulate(even(ranks, virtual), 2 * ranks, "teacher_pipelined")
    table = get_schedule_table(2 * ranks, virtual, ranks)
    for rank in range(ranks):
        in_time = sorted((which for which in timeline if which.rank == rank), key=lambda which: timeline[which].start)
        taken = {kind: [(which.micro_batch, which.chunk) for which in in_time if which.kind == kind] for kind in ("forward", "backward")}
        assert taken == {"forward": table, "backward": [(number, virtual - 1 - chunk) for number, chunk in table]}


@pytest.mark.parametrize(("virtual", "order"), [(1, order) for order in ORDERS] + [(2, order) for order in orders_of(2)])
@pytest.mark.parametrize("seed", range(5))
def test_every_pass_runs_once_in_its_time_and_after_what_it_needs(virtual: int, order: Order, seed: int) -> None:
    """Uneven stages, micro-batches that the ranks do not divide where the schedule takes such."""
    dice = random.Random(seed)
    ranks, micro_batches = dice.randint(1, 6), dice.randint(1, 13)
    micro_batches *= ranks if virtual > 1 else 1
    works = StageWorks(*(tuple(dice.uniform(0.1, 2) for _ in range(stages)) for stages in (ranks, ranks * virtual, ranks * virtual)))
    timeline = simulate(works, micro_batches, order)
    teachers = {"teacher_on_one_rank": micro_batches, "teacher_pipelined": micro_batches * ranks, "one_schedule": 0}[order]
    assert len(timeline) == teachers + 2 * ranks * virtual * micro_batches
    for rank in range(ranks):
        spans = sorted(span for which, span in timeline.items() if which.rank == rank)
        assert all(before.end <= after.start + 1e-9 for before, after in pairwise(spans))
    for number in range(micro_batches):
        depth = [(rank, number, chunk) for chunk in range(virtual) for rank in range(ranks)]
        forward = [timeline[Pass("forward", *where)] for where in depth]
        backward = [timeline[Pass("backward", *where)] for where in reversed(depth)]
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


def test_what_no_interleaved_schedule_takes_is_refused() -> None:
    with pytest.raises(ValueError, match="a multiple of 2 micro-batches, not 3"):
        simulate(even(2, 2), 3, "teacher_pipelined")
    with pytest.raises(ValueError, match="one_schedule with 2 virtual stages"):
        simulate(even(2, 2), 4, "one_schedule")


def test_passes_that_wait_for_each_other_are_told_instead_of_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that wants the backward one of the stage behind it."""
    needed = simulator._needed

    def wrong(wanted: Pass, *arguments: Any) -> list[Pass]:
        found = needed(wanted, *arguments)
        return [*found, Pass("backward", 1, wanted.micro_batch)] if wanted[:2] == ("forward", 0) else found

    monkeypatch.setattr(simulator, "_needed", wrong)
    with pytest.raises(RuntimeError, match=r"every rank waits for another one: .*'forward', 0, 0, 0"):
        simulate(even(2), 2, "teacher_pipelined")


@pytest.mark.parametrize(("ranks", "virtual"), [(2, 2), (4, 2), (2, 3)])
def test_each_rank_of_an_interleaved_schedule_warms_up_as_megatrons_does(ranks: int, virtual: int) -> None:
    """megatron-core's get_pp_rank_microbatches: 2 · (P − rank − 1) + (V − 1) · P forward passes, and one more ahead of the first backward."""
    stages = ranks * virtual
    works = StageWorks((1.0,) * ranks, (1.0,) * stages, (2.0,) * stages)
    timeline = simulate(works, 4 * ranks, "teacher_on_one_rank")
    for rank in range(ranks):
        of_rank = sorted((span.start, which.kind) for which, span in timeline.items() if which.rank == rank and which.kind != "teacher")
        ahead = [kind for _, kind in of_rank].index("backward")
        assert ahead == 2 * (ranks - rank - 1) + (virtual - 1) * ranks + 1
