"""Layout: the sizes of a model's process groups, and the groups themselves."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron_megatron.config.schema import Parallel
from minitron_megatron.errors import LayoutError
from minitron_megatron.parallel.world import World


@dataclass(frozen=True)
class Layout:
    """Where this process stands in a model's tensor, pipeline and data-parallel groups."""

    tensor: int
    pipeline: int
    data: int
    sequence_parallel: bool
    split_rule: str
    groups: ProcessGroupCollection

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
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pipeline - 1

    def describe(self) -> str:
        sequence = " + sequence parallel" if self.sequence_parallel else ""
        return f"tensor {self.tensor} × pipeline {self.pipeline} × data {self.data}{sequence}"


def global_layout(parallel: Parallel, world: World, *, seed: int = 1234) -> Layout:
    """Makes megatron's global process groups, the student's, and returns them as a Layout.

    Raises LayoutError where the sizes do not make up the number of processes that were started.
    """
    model_processes = parallel.tensor * parallel.pipeline
    if world.size != model_processes * parallel.data:
        raise LayoutError(
            f"parallel: tensor {parallel.tensor} × pipeline {parallel.pipeline} × data {parallel.data} = {parallel.processes} processes, "
            f"but {world.size} were started; set parallel.data={world.size // model_processes or 1} or start {parallel.processes}"
        )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=parallel.tensor, pipeline_model_parallel_size=parallel.pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        data=parallel.data,
        sequence_parallel=parallel.sequence,
        split_rule=parallel.layers_per_stage,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def destroy_layout() -> None:
    """Forgets megatron's global groups, so that another layout can be made in the same processes (tests)."""
    parallel_state.destroy_model_parallel()
