"""Learned projections from the student's channels to the teacher's: part of the student while it trains, not of what is published.

Legend: D student's hidden, E teacher's hidden.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor, nn

from minitron_megatron.distill.hidden.map import Term, projection_holders
from minitron_megatron.distill.hidden.states import state_modules
from minitron_megatron.model.gpt import HiddenStateGPT
from minitron_megatron.parallel.layout import Layout

ATTRIBUTE = "distillation_projections"
SHARED = f"{ATTRIBUTE}.shared.weight"


class Projections(nn.ModuleDict):
    """A chunk's projections by name; a checkpoint holds each once, whatever number of chunks have a copy."""

    def __init__(self, projections: Mapping[str, nn.Linear], copies: Mapping[str, int], tensor: dist.ProcessGroup) -> None:
        super().__init__(projections)
        self._copies, self._tensor = copies, tensor

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None, **_: Any) -> dict[str, ShardedTensor]:
        """The replica that is written is the one of the first chunk, tensor rank and data-parallel rank that hold it."""
        ranks = (self._tensor.rank(), metadata["dp_cp_group"].rank())
        return {
            f"{prefix}{name}.weight": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}.weight", projection.weight, replica_id=(self._copies[name], *ranks)
            )
            for name, projection in self.items()
        }


def add_projections(
    chunk: HiddenStateGPT,
    terms: Sequence[Term],
    *,
    layers_per_chunk: Sequence[int],
    number: int,
    teacher_hidden: int,
    channels: Sequence[int] | None = None,
) -> None:
    """Gives a chunk the projections of the terms whose student state arises in it: after its weights are loaded, before DDP wraps it.

    layers_per_chunk, number: see projection_holders; which of the chunks this is. channels: the teacher's channel of each of the student's.
    """
    holders = projection_holders(terms, layers_per_chunk)
    here = [term.projection for term in terms if term.student in state_modules(chunk)]
    if not here:
        return
    copies = {name: holders[name].index(number) for name in dict.fromkeys(here)}
    like = next(chunk.parameters())
    built = {name: _projection(name, teacher_hidden, chunk.config.hidden_size, channels).to(like) for name in copies}
    for name, projection in built.items():
        _mark(projection.weight, sequence_parallel=chunk.config.sequence_parallel, copy=copies[name], copies=len(holders[name]))
    setattr(chunk, ATTRIBUTE, Projections(built, copies, chunk.layout.groups.tp))


def initial_weight(name: str, teacher_hidden: int, student_hidden: int, channels: Sequence[int] | None) -> Tensor:
    """[E, D] fp32, the same in every process.

    With the plan's kept channels: each into its own place among the teacher's, so that training starts from the distance that pruning made, not
    from that of a random map. A student of other descent: normal(0, 1/√D), which keeps the size of a normed state, seeded by the name.
    """
    weight_ED = torch.zeros(teacher_hidden, student_hidden)
    if channels is not None:
        weight_ED[torch.as_tensor(channels), torch.arange(student_hidden)] = 1.0
        return weight_ED
    return weight_ED.normal_(std=student_hidden**-0.5, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def shared_projection_group(holders: Sequence[int], layout: Layout) -> dist.ProcessGroup | None:
    """This process's group of the pipeline ranks that hold the shared projection; None where it holds none or no other rank does.

    holders: projection_holders(…)["shared"]. Every process of the world must call it at the same point: groups are made by all together.
    """
    pipeline = layout.groups.pp
    stages = sorted({chunk % layout.pipeline for chunk in holders})
    if len(stages) < 2:
        return None
    mine: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(mine, dist.get_process_group_ranks(pipeline))
    found = None
    for ranks in sorted({tuple(ranks) for ranks in mine}):
        members = [ranks[stage] for stage in stages]
        group = dist.new_group(members, timeout=layout.timeout)
        found = group if dist.get_rank() in members else found
    return found


def sum_shared_projection_grads(chunks: Iterable[nn.Module], group: dist.ProcessGroup | None) -> None:
    """Adds the gradients of all copies of the shared projection and gives every copy the sum.

    To be called by finalize_model_grads_func after megatron's, as for tied embeddings. chunks: this process's, wrapped by DDP; group: see
    shared_projection_group. After a reduce-scatter only this data-parallel rank's shard of the sum is right, the same one on every stage.
    """
    copies = [weight for chunk in chunks for name, weight in chunk.named_parameters() if name.endswith(SHARED)]
    if not copies or (len(copies) == 1 and group is None):
        return
    gradients: list[Tensor] = [getattr(weight, "main_grad") for weight in copies]  # noqa: B009 - megatron's, unknown to torch's types
    total = torch.stack(gradients).sum(0)
    if group is not None:
        dist.all_reduce(total, group=group)
    for gradient in gradients:
        gradient.copy_(total)


def without_projections(state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's (sharded) state as it is published."""
    return {key: value for key, value in state.items() if not key.startswith(f"{ATTRIBUTE}.")}


def _projection(name: str, teacher_hidden: int, student_hidden: int, channels: Sequence[int] | None) -> nn.Linear:
    projection = nn.Linear(student_hidden, teacher_hidden, bias=False, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        projection.weight.copy_(initial_weight(name, teacher_hidden, student_hidden, channels))
    return projection


def _mark(weight: Tensor, *, sequence_parallel: bool, copy: int, copies: int) -> None:
    """megatron's marks on a Parameter; its own code for a tied embedding does the same."""
    marks: dict[str, bool] = {}
    if sequence_parallel:
        marks["sequence_parallel"] = True  # its gradient is of a part of the sequence: finalize_model_grads adds them up over tensor ranks
    if copies > 1:
        marks["shared_embedding"] = True  # a bucket of its own, so that the distributed optimizer's shards are the same on every stage
        marks["shared"] = copy > 0  # the gradient norm counts it once
    for name, value in marks.items():
        setattr(weight, name, value)
