"""Whole models ↔ torch_dist checkpoints under any layout, through megatron's dist_checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from minitron_megatron.errors import CheckpointError
from minitron_megatron.platform.versions import require_readable


class MegatronChunk(Protocol):
    """What a GPTModel gives to be saved and loaded."""

    pg_collection: Any

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> Any: ...


class MegatronModel(Protocol):
    """A process's part of a model: a chunk for each virtual pipeline stage."""

    @property
    def chunks(self) -> Sequence[MegatronChunk]: ...


# one key per layer, not stacked [L, …] keys: pruning layers or neurons of one changes no other tensor
METADATA = {"non_homogeneous_layers": True}


def model_state(model: MegatronModel) -> dict[str, Any]:
    """Each chunk's sharded state, as model0, model1, …; on disk the tensors' own global names are the keys."""
    return {f"model{number}": chunk_state(chunk) for number, chunk in enumerate(model.chunks)}


def chunk_state(chunk: MegatronChunk) -> dict[str, Any]:
    """A chunk's sharded state without the empty `_extra_state` entries, which our streams do not write."""
    metadata = {**METADATA, "dp_cp_group": chunk.pg_collection.dp_cp}
    state = chunk.sharded_state_dict(metadata=metadata)
    return {key: entry for key, entry in state.items() if not (isinstance(entry, ShardedObject) and _is_empty(entry))}


def load_model(model: MegatronModel, folder: Path) -> None:
    """Fills a model's weights from a checkpoint of any layout; rows beyond the vocabulary stay zero."""
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(f"{folder}: no torch_dist checkpoint (its metadata.json is missing); make it anew")
    require_readable(folder)
    set_model_state(model, dist_checkpointing.load(model_state(model), str(folder)))


def set_model_state(model: MegatronModel, state: dict[str, Any]) -> None:
    """Loaded tensors into the chunks; the inverse of model_state."""
    for number, chunk in enumerate(model.chunks):
        found = chunk.load_state_dict(state[f"model{number}"], strict=False)
        # _extra_state is not loaded where it is empty; megatron's own modules fill it in, Transformer Engine's miss it
        wrong = [key for key in (*found.missing_keys, *found.unexpected_keys) if not key.endswith("_extra_state")]
        if wrong:
            raise CheckpointError(f"tensors of the model and of its checkpoint differ: {', '.join(wrong[:5])}; make the checkpoint anew")


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Writes a sharded state; every process of the model takes part."""
    dist_checkpointing.save(state, str(folder))


def _is_empty(entry: ShardedObject) -> bool:
    data = entry.data
    if isinstance(data, Tensor):  # Transformer Engine's, where nothing is FP8
        return data.numel() == 0
    return data is None or (hasattr(data, "getbuffer") and data.getbuffer().nbytes == 0)
