"""Whole models ↔ torch_dist checkpoints under any layout, through megatron's dist_checkpointing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from minitron_megatron.errors import CheckpointError
from minitron_megatron.model.fp8.weights import are_rounded, set_initial_values
from minitron_megatron.platform.versions import require_readable


class MegatronChunk(Protocol):
    """What a GPTModel gives to be saved and loaded."""

    pg_collection: Any
    config: Any

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> dict[str, Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> Any: ...

    def named_parameters(self) -> Iterator[tuple[str, Any]]: ...


class MegatronModel(Protocol):
    """A process's part of a model: a chunk for each virtual pipeline stage."""

    @property
    def chunks(self) -> Sequence[MegatronChunk]: ...


# one key per layer, not stacked [L, …] keys: pruning layers or neurons of one changes no other tensor
METADATA = {"non_homogeneous_layers": True}

LAYERS_OF_ROUNDED = 4
"""That are read at a time where weights are FP8: 1.7 GB of an 8B model."""

EXTRA_STATE = "_extra_state"
"""What torch calls a module's state that is no tensor."""


def model_state(model: MegatronModel) -> dict[str, Any]:
    """Each chunk's sharded state, as model0, model1, …; on disk the tensors' own global names are the keys."""
    return {f"model{number}": chunk_state(chunk) for number, chunk in enumerate(model.chunks)}


def chunk_state(chunk: MegatronChunk) -> dict[str, Any]:
    """A chunk's sharded state without the `_extra_state` entries, which our streams neither write nor read.

    Transformer Engine's are empty until a module has computed in FP8, and then hold its recipe: how the next stage computes is its own affair.
    """
    metadata = {**METADATA, "dp_cp_group": chunk.pg_collection.dp_cp}
    state = chunk.sharded_state_dict(metadata=metadata)
    return {key: entry for key, entry in state.items() if not (isinstance(entry, ShardedObject) and EXTRA_STATE in key)}


def load_model(model: MegatronModel, folder: Path, *, layers_at_a_time: int | None = None) -> None:
    """Fills a model's weights from a checkpoint of any layout; rows beyond the vocabulary stay zero. Every process calls this.

    layers_at_a_time: of each chunk, None for all at once, or a few where weights are FP8: what is read of those lies beside them in bf16, twice
    their size.
    """
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(f"{folder}: no torch_dist checkpoint (its metadata.json is missing); make it anew")
    require_readable(folder)
    layers = layers_at_a_time or (LAYERS_OF_ROUNDED if any(are_rounded(chunk.config) for chunk in model.chunks) else None)
    missing = [set(chunk.state_dict()) for chunk in model.chunks]
    for part in _parts(model_state(model), layers):
        missing = [names & lacking for names, lacking in zip(missing, _load_part(model, part, folder), strict=True)]
    _require_nothing_missing(missing, str(folder))


def set_model_state(model: MegatronModel, state: dict[str, Any]) -> None:
    """Loaded tensors into the chunks; the inverse of model_state."""
    missing = [_take(chunk, state[f"model{number}"]) for number, chunk in enumerate(model.chunks)]
    _require_nothing_missing(missing, "a training checkpoint")


def _load_part(model: MegatronModel, part: dict[str, Any], folder: Path) -> list[set[str]]:
    """Names of each chunk that it did not fill; a function of its own, so that what was read is gone before the next part is."""
    loaded = dist_checkpointing.load(part, str(folder))
    return [_take(chunk, loaded.get(f"model{number}", {})) for number, chunk in enumerate(model.chunks)]


def _parts(state: dict[str, Any], layers: int | None) -> Iterator[dict[str, Any]]:
    """The state in parts of so many layers of each chunk, as many parts on every process; what belongs to no layer comes with the first.

    A part is taken out of the state: megatron puts what it reads of an FP8 weight into the weight's entry, which would keep all of it.
    """
    if layers is None:
        yield state
        return
    last = max((_layer(key) // layers for chunk in state.values() for key in chunk), default=0)
    for part in range(_highest(last) + 1):
        yield {name: {key: chunk.pop(key) for key in list(chunk) if _layer(key) // layers == part} for name, chunk in state.items()}


def _layer(key: str) -> int:
    """Counted from 0 within its chunk; 0 for what belongs to none."""
    found = re.search(r"\blayers\.(\d+)\.", key)
    return int(found[1]) if found else 0


def _highest(number: int) -> int:
    """Of all processes: loading is a conversation of all of them, and stages may have different numbers of layers."""
    if not dist.is_initialized():
        return number
    found = [number] * dist.get_world_size()
    dist.all_gather_object(found, number)
    return max(found)


def _take(chunk: MegatronChunk, tensors: dict[str, Any]) -> set[str]:
    """Names that the chunk has and the tensors lack. Raises CheckpointError for names that it has not."""
    found = chunk.load_state_dict(tensors, strict=False)
    set_initial_values(chunk.named_parameters(), tensors)
    if found.unexpected_keys:
        raise CheckpointError(f"the checkpoint has weights that the model lacks: {', '.join(sorted(found.unexpected_keys)[:3])}; make it anew")
    return set(found.missing_keys)


def _require_nothing_missing(missing: list[set[str]], where: str) -> None:
    names = sorted(name for chunk in missing for name in chunk if EXTRA_STATE not in name)
    if names:
        raise CheckpointError(f"{where}: lacks {len(names)} weights of the model, such as {names[0]}; make it anew")


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Writes a sharded state; every process of the model takes part."""
    dist_checkpointing.save(state, str(folder))
