"""Delayed scaling's memory in training checkpoints, under keys of its own, of no layout; published weights hold none of it."""

from __future__ import annotations

from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from minitron_megatron.model.fp8.state import PREFIX, scaling_state
from minitron_megatron.model.gpt import StageModel


def scaling_entries(model: StageModel) -> dict[str, ShardedTensor]:
    """What a checkpoint keeps: whole tensors, written once by the first tensor and data-parallel rank; empty without delayed scaling."""
    groups = model.layout.groups
    replica = (0, groups.tp.rank(), groups.dp_cp.rank())
    return {name: ShardedTensor.from_rank_offsets(name, tensor, replica_id=replica) for name, tensor in scaling_state(model).items()}


def load_scaling(model: StageModel, folder: Path) -> None:
    """Fills what the checkpoint holds; the rest stays fresh: under another expert layout a rank has experts in places that it does not know.

    Every process calls this.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    if not any(name.startswith(PREFIX) for name in stored):  # the same on every process, also on one whose stage has no layers
        return
    fitting = {name: entry for name, entry in scaling_entries(model).items() if name in stored and stored[name].global_shape == entry.global_shape}
    loaded = dist_checkpointing.load(fitting, str(folder))
    state = scaling_state(model)
    for name in fitting:
        state[name].copy_(loaded[name])
