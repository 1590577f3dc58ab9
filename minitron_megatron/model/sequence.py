"""Hidden states under sequence parallelism: the whole sequence out of the tensor ranks' parts."""

from __future__ import annotations

from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from minitron_megatron.parallel.layout import Layout


def whole_sequence(hidden_SBD: Tensor, layout: Layout) -> Tensor:
    """[S, B, D] with all of S on every tensor rank."""
    if not layout.sequence_parallel:
        return hidden_SBD
    return gather_from_sequence_parallel_region(hidden_SBD, group=layout.groups.tp)
