"""Layout: the sizes of a model's process groups, and the groups themselves.

Ranks are dealt as megatron deals them: tensor is the fastest, then context, then data, then pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import NamedTuple

from megatron.core import parallel_state, tensor_parallel
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron_megatron.config.parallel import Parallel, Rule, TeacherParallel
from minitron_megatron.errors import LayoutError
from minitron_megatron.parallel.world import World


class Place(NamedTuple):
    """Where a rank stands in a layout."""

    tensor: int
    data: int
    stage: int
    context: int = 0


@dataclass(frozen=True)
class Layout:
    """Sizes of a model's tensor, context, data and pipeline-parallel groups, and this process's groups."""

    tensor: int
    pipeline: int
    data: int
    sequence_parallel: bool
    split_rule: Rule
    groups: ProcessGroupCollection = field(repr=False)
    virtual: int = 1
    expert: int = 1
    """Data-parallel ranks that share the experts of a layer out among themselves."""
    context: int = 1
    """Ranks that share each sequence out among themselves (parallel/context.py)."""
    timeout: timedelta = timedelta(minutes=30)
    """Longest wait for the others; torch gives a group that is made without one its own 30 minutes, not those of the world."""

    @property
    def tensor_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def stage(self) -> int:
        return self.groups.pp.rank()

    @property
    def data_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def context_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def expert_rank(self) -> int:
        return self.groups.ep.rank()

    @property
    def place(self) -> Place:
        return Place(self.tensor_rank, self.data_rank, self.stage, self.context_rank)

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pipeline - 1

    def rank_of(self, place: Place) -> int:
        return place.tensor + self.tensor * (place.context + self.context * (place.data + self.data * place.stage))

    def place_of(self, rank: int) -> Place:
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        stage, data = divmod(rest, self.data)
        return Place(tensor, data, stage, context)

    def same_sizes(self, other: Layout) -> bool:
        """Whether every rank holds the same part of a model in both; virtual stages and the layers of a stage may differ."""
        mine, theirs = ((x.tensor, x.pipeline, x.data, x.sequence_parallel, x.expert, x.context) for x in (self, other))
        return mine == theirs

    def describe(self) -> str:
        context = f" × context {self.context}" if self.context > 1 else ""
        virtual = f" × virtual {self.virtual}" if self.virtual > 1 else ""
        sequence = " + sequence parallel" if self.sequence_parallel else ""
        experts = f" (expert {self.expert})" if self.expert > 1 else ""
        return f"tensor {self.tensor}{context} × pipeline {self.pipeline}{virtual} × data {self.data}{experts}{sequence}"


def global_layout(parallel: Parallel, world: World, *, seed: int = 1234) -> Layout:
    """Makes megatron's global process groups, the student's, and returns them as a Layout.

    Raises LayoutError where the sizes do not make up the number of processes that were started.
    """
    if world.size != parallel.processes:
        others = parallel.processes // parallel.data
        context = f" × context {parallel.context}" if parallel.context > 1 else ""
        raise LayoutError(
            f"parallel: tensor {parallel.tensor}{context} × pipeline {parallel.pipeline} × data {parallel.data} = {parallel.processes} processes, "
            f"but {world.size} were started; set parallel.data={world.size // others or 1} or start {parallel.processes}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        distributed_timeout_minutes=parallel.timeout_seconds / 60,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=parallel.data,
        sequence_parallel=parallel.sequence,
        split_rule=parallel.layers_per_stage,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        virtual=parallel.virtual,
        expert=parallel.expert,
        context=parallel.context,
        timeout=timedelta(seconds=parallel.timeout_seconds),
    )


def teacher_layout(teacher: TeacherParallel, world: World, student: Layout) -> Layout:
    """The teacher's own groups on the same ranks, with the student's context size; the student's groups where the sizes are the same.

    Every process calls this. Raises LayoutError where tensor × context × pipeline does not divide the number of processes, and for other sizes than
    those of a student whose experts are shared out.
    """
    model_processes = teacher.tensor * student.context * teacher.pipeline
    if world.size % model_processes:
        context = f" × context {student.context}" if student.context > 1 else ""
        raise LayoutError(
            f"parallel.teacher: tensor {teacher.tensor}{context} × pipeline {teacher.pipeline} = {model_processes} does not divide the "
            f"{world.size} processes; choose sizes whose product does"
        )
    data = world.size // model_processes
    layout = Layout(teacher.tensor, teacher.pipeline, data, teacher.sequence, teacher.layers_per_stage, student.groups, expert=student.expert)
    layout = replace(layout, context=student.context, timeout=student.timeout)
    if layout.same_sizes(student):
        return layout
    if student.expert > 1:
        raise LayoutError("parallel.teacher: a layout of its own is not supported where experts are shared out; set parallel.teacher=student")
    return replace(layout, groups=_grid_groups(layout))


def destroy_layout() -> None:
    """Forgets megatron's global groups, so that another layout can be made in the same processes (tests)."""
    parallel_state.destroy_model_parallel()


_GRID_GROUPS = {
    "tp": "tp",
    "cp": "cp",
    "ep": "ep",
    "dp": "dp",
    "pp": "pp",
    "mp": ["tp", "pp"],
    "tp_cp": ["tp", "cp"],
    "dp_cp": ["cp", "dp"],
    "tp_dp_cp": ["tp", "cp", "dp"],
}
"""Field of ProcessGroupCollection → dimensions of the grid."""


def _grid_groups(layout: Layout) -> ProcessGroupCollection:
    """Groups of a dense model that runs beside the one that megatron's global groups belong to."""
    grid = HyperCommGrid([layout.tensor, layout.context, 1, layout.data, layout.pipeline], ["tp", "cp", "ep", "dp", "pp"])
    groups = ProcessGroupCollection()
    for name, dims in _GRID_GROUPS.items():
        setattr(groups, name, grid.create_pg(dims, timeout=layout.timeout))
    # a frozen model without its own output weight ties nothing between its first and last stage
    groups.embd = groups.pos_embd = None
    groups.expt_tp, groups.tp_ep, groups.tp_ep_pp, groups.expt_dp = groups.tp, groups.tp, groups.mp, groups.dp_cp
    return groups
