"""The weights of the output layer's losses, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minitron_megatron.config.losses import LossName, LossWeight, WeightSchedule
from minitron_megatron.training.balance import LossBalance


class LossWeights:
    """Numbers, schedules that depend on the step's number alone, and weights that follow the first loss.

    A dynamic weight is first weight · first loss / own loss of the step before, from sums over all tokens: what arXiv 2407.14679, section 3
    does with the losses on hidden states. It stays on the device.
    """

    def __init__(self, weights: Mapping[LossName, LossWeight], *, run_steps: int, device: torch.device | str) -> None:
        """weights: by the recipe's names, in its order; those that are the number 0 are no losses. run_steps: of the whole run."""
        self._weights: dict[str, LossWeight] = {name: weight for name, weight in weights.items() if weight != 0}
        self._last_step = max(run_steps - 1, 1)
        self._balances = {name: LossBalance("dynamic", device) for name, weight in self._weights.items() if weight == "dynamic"}

    @property
    def is_set(self) -> bool:
        """False until the first losses are known where a weight follows one."""
        return all(balance.is_set for balance in self._balances.values())

    @property
    def moving(self) -> list[str]:
        """Names of those that are not the same at every step."""
        return [name for name, weight in self._weights.items() if not isinstance(weight, int | float)]

    def at(self, step: int) -> dict[str, float | Tensor]:
        """step: counted from 0."""
        return {name: self._at(name, weight, step) for name, weight in self._weights.items()}

    def update(self, used: Mapping[str, float | Tensor], sums: Mapping[str, Tensor]) -> None:
        """Takes the dynamic weights of the next step from a step's weights and losses by name, each [], over all tokens of all processes."""
        first = next(iter(self._weights))
        for name, balance in self._balances.items():
            balance.update(used[first] * sums[first], sums[name])

    def state_dict(self) -> dict[str, Tensor]:
        """For the checkpoint: a continued run starts with the weights that it would have had."""
        return {f"{name}.{key}": value for name, balance in self._balances.items() for key, value in balance.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, balance in self._balances.items():
            if f"{name}.alpha" in state:
                balance.load_state_dict({key: state[f"{name}.{key}"] for key in ("alpha", "is_set")})

    def _at(self, name: str, weight: LossWeight, step: int) -> float | Tensor:
        if isinstance(weight, WeightSchedule):
            return scheduled(weight, step, weight.steps or self._last_step)
        return self._balances[name].alpha if isinstance(weight, str) else weight


def scheduled(schedule: WeightSchedule, step: int, steps: int) -> float:
    """The weight so many steps behind the first one."""
    done = min(step / steps, 1.0)
    moved = done if schedule.kind == "linear" else (1 - math.cos(math.pi * done)) / 2
    return schedule.start + (schedule.end - schedule.start) * moved
