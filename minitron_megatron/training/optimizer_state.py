"""The optimizer's state in one form for every layout: tensors under the names of the weights that they belong to.

megatron's plain and distributed optimizer put the same tensors into other structures. Of those only the tensors are kept, so that
a run may continue with another tensor, pipeline or data-parallel size and with the other kind of optimizer:
`optimizer.state.exp_avg.NAME`, `optimizer.state.exp_avg_sq.NAME` and, below fp32, `optimizer.state.fp32_param.NAME`. The step
count is the run's own, and everything else in a parameter group comes from the recipe.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.optimizer.optimizer import MegatronOptimizer

METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
MAIN_PARAMETER = "optimizer.state.fp32_param."
DISTRIBUTED_MAIN_PARAMETER = "optimizer.state.param."


class OptimizerState:
    """One process's part of an optimizer's state, to be saved or to be filled from a checkpoint; call it on every process.

    model_state: the sharded state of the model, whose parameters name the tensors.
    """

    def __init__(self, optimizer: MegatronOptimizer, model_state: dict[str, Any], *, loading: bool) -> None:
        self._optimizer = optimizer
        self._structure = optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=METADATA)
        self._main_is_the_weight = optimizer.config.params_dtype == torch.float32
        self._entries = _sharded_entries(self._structure)

    def tensors(self) -> dict[int, ShardedBase]:
        """What a checkpoint keeps beside the weights."""
        return {number: _named(entry) for number, entry in enumerate(self._entries) if not self._is_the_weight(entry)}

    def weights(self) -> dict[int, ShardedBase]:
        """The weights once more, as the optimizer shares them out; to be asked for apart from the model's, because megatron takes no
        part of an expert's tensor twice into one request."""
        return {number: _weight_itself(entry) for number, entry in enumerate(self._entries) if self._is_the_weight(entry)}

    @property
    def has_weights(self) -> bool:
        """The same on every process, also on one that has no part of them."""
        return self._main_is_the_weight and self._optimizer.config.use_distributed_optimizer

    def load(self, loaded: dict[int, Any], *, finished_steps: int) -> None:
        """Puts what a checkpoint gave for `tensors` and `weights` into the optimizer."""
        by_entry = {id(entry): loaded[number] for number, entry in enumerate(self._entries)}
        structure = _filled(self._structure, by_entry)
        for state in _dictionaries(structure):
            for group in state.get("param_groups", ()):
                group["step"] = finished_steps
            if megatron_optimizer.USING_PYTORCH_OPTIMIZER and "state" in state:
                state["state"]["common_step"] = torch.tensor(float(finished_steps))
        self._optimizer.load_state_dict(structure)

    def _is_the_weight(self, entry: ShardedBase) -> bool:
        """An fp32 model has no main copy apart from its weights, but the distributed optimizer shares out its own copy of them."""
        return self._main_is_the_weight and entry.key.startswith(DISTRIBUTED_MAIN_PARAMETER)


def _weight_itself(entry: ShardedBase) -> ShardedBase:
    return replace(entry, key=entry.key.removeprefix(DISTRIBUTED_MAIN_PARAMETER))


def _named(entry: ShardedBase) -> ShardedBase:
    if entry.key.startswith(DISTRIBUTED_MAIN_PARAMETER):
        return replace(entry, key=MAIN_PARAMETER + entry.key.removeprefix(DISTRIBUTED_MAIN_PARAMETER))
    return entry


def _sharded_entries(structure: Any) -> list[Any]:
    if isinstance(structure, ShardedBase):
        return [structure]
    if isinstance(structure, dict):
        structure = structure.values()
    elif not isinstance(structure, (list, tuple)):
        return []
    return [entry for part in structure for entry in _sharded_entries(part)]


def _filled(structure: Any, by_entry: dict[int, Any]) -> Any:
    """The structure with tensors in the entries' places; only containers are copied."""
    if isinstance(structure, ShardedBase):
        return by_entry[id(structure)]
    if isinstance(structure, LocalNonpersistentObject):
        return structure.unwrap()
    if isinstance(structure, dict):
        return {key: _filled(value, by_entry) for key, value in structure.items()}
    if isinstance(structure, list):
        return [_filled(value, by_entry) for value in structure]
    return structure


def _dictionaries(structure: Any) -> list[dict[Any, Any]]:
    """Every dictionary in it, however deep."""
    if isinstance(structure, dict):
        return [structure, *(found for value in structure.values() for found in _dictionaries(value))]
    return [found for value in structure for found in _dictionaries(value)] if isinstance(structure, list) else []
