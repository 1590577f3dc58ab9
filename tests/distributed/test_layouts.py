"""Process groups of teacher and student on the same ranks: who stands where, and who is together."""

from __future__ import annotations

import pytest
import torch
from standing import Stand, counted_by_hand, stand_in

from minitron_megatron.config.parallel import Parallel, TeacherParallel
from minitron_megatron.parallel.layout import global_layout, teacher_layout
from minitron_megatron.parallel.world import World

from .pool import Pool
from .tiny import name_of, with_teacher


def stand(world: World, parallel: Parallel) -> tuple[Stand, Stand, bool]:
    student = global_layout(parallel, world)
    teacher = teacher_layout(parallel.teacher, world, student)  # type: ignore[arg-type]
    return stand_in(student), stand_in(teacher), teacher.groups is student.groups


@pytest.mark.parametrize(
    "parallel",
    [
        with_teacher(Parallel(tensor=2, pipeline=2), TeacherParallel(pipeline=2)),
        with_teacher(Parallel(pipeline=2, virtual=2, data=2), TeacherParallel(tensor=2)),
        with_teacher(Parallel(data=4), TeacherParallel(tensor=4)),
        with_teacher(Parallel(tensor=2, data=2), TeacherParallel(tensor=2)),
        with_teacher(Parallel(context=2, data=2), TeacherParallel(tensor=2)),
        with_teacher(Parallel(tensor=2, context=2), TeacherParallel(pipeline=2)),
    ],
    ids=name_of,
)
def test_ranks_are_dealt_tensor_first_then_context_then_data_then_pipeline_in_both_layouts(pool: Pool, parallel: Parallel) -> None:
    own = parallel.teacher
    assert isinstance(own, TeacherParallel)
    for rank, (student, teacher, shared) in enumerate(pool.run(stand, parallel, processes=4)):
        context = parallel.context
        assert student == counted_by_hand(rank, tensor=parallel.tensor, pipeline=parallel.pipeline, data=parallel.data, context=context)
        replicas = 4 // (own.tensor * own.pipeline * context)
        assert teacher == counted_by_hand(rank, tensor=own.tensor, pipeline=own.pipeline, data=replicas, context=context)
        assert shared == ((own.tensor, own.pipeline) == (parallel.tensor, parallel.pipeline))


def longest_waits(world: World, parallel: Parallel) -> dict[str, set[float]]:
    """Seconds after which the collectives of each layout's groups give up."""
    student = global_layout(parallel, world)
    teacher = teacher_layout(parallel.teacher, world, student)  # type: ignore[arg-type]
    fields = ("tp", "pp", "dp", "mp", "tp_dp_cp")
    return {
        name: {getattr(layout.groups, field)._get_backend(torch.device("cpu")).options._timeout.total_seconds() for field in fields}
        for name, layout in (("student", student), ("teacher", teacher))
    }


def test_no_group_waits_longer_than_the_recipe_says(pool: Pool) -> None:
    """A group that is made without a timeout takes torch's 30 minutes, not the world's: a rank that hangs then hangs the job."""
    parallel = with_teacher(Parallel(tensor=2, pipeline=2, timeout_seconds=77), TeacherParallel(tensor=2))
    for waits in pool.run(longest_waits, parallel, processes=4):
        assert waits == {"student": {77.0}, "teacher": {77.0}}
