"""AdamW for CPU processes that counts its steps where megatron-core looks for them.

megatron's distributed optimizer is written for FusedAdam (Transformer Engine, apex), which keeps one step count in each
parameter group. Where neither is installed megatron falls back to torch's AdamW, which keeps a count in each parameter's
state, and a checkpoint no longer loads: before the first step there is no count to be read (`assert len(steps) == 1`), the
state that is made for loading has none (`KeyError: 'step'`), and what is restored is one tensor shared by all parameters,
which each of them then adds 1 to.

The update is torch's fused one, a single pass over weights, gradients and moments where the plain one makes eight. What is left behind the last
whole vector of a tensor the fused one rounds otherwise, so that bits would depend on where a tensor is cut: here it is filled up to a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from minitron_megatron.errors import PlatformError

VECTOR_ELEMENTS = 16
"""Of fp32 in the widest vector of a CPU, and in a cache line, by which torch shares a tensor out to threads."""


class GroupAdamW(Optimizer):
    """torch's fused AdamW, to the bit, with FusedAdam's state: `step` in the group; exp_avg and exp_avg_sq of each parameter.

    No subclass of torch.optim.AdamW, whose __setstate__ asks every parameter's state for its step.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode or capturable:
            raise PlatformError("on CPU Adam has decoupled weight decay and no CUDA graph; leave OptimizerConfig at its defaults")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient, by torch's own function."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        with_grad = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not with_grad:
            return
        finished = group.get("step", 0)
        flat = [
            [tensor.detach().view(-1) for tensor in (parameter, parameter.grad, *self._moments(parameter)) if tensor is not None]
            for parameter in with_grad
        ]
        _update([[_whole_vectors(tensor) for tensor in tensors] for tensors in flat], group, finished)
        _update_filled_up([[_rest(tensor) for tensor in tensors] for tensors in flat], group, finished)
        group["step"] = finished + 1

    def _moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state["exp_avg"], state["exp_avg_sq"]


def _whole_vectors(flat: Tensor) -> Tensor:
    return flat[: flat.numel() // VECTOR_ELEMENTS * VECTOR_ELEMENTS]


def _rest(flat: Tensor) -> Tensor:
    return flat[flat.numel() // VECTOR_ELEMENTS * VECTOR_ELEMENTS :]


def _update(parts: list[list[Tensor]], group: dict[str, Any], finished: int) -> None:
    """parts: weights, gradients, first and second moments, each flat."""
    parts = [part for part in parts if part[0].numel()]
    if not parts:
        return
    weights, gradients, first_moments, second_moments = (list(tensors) for tensors in zip(*parts, strict=True))
    beta1, beta2 = group["betas"]
    adamw(
        weights,
        gradients,
        first_moments,
        second_moments,
        [],
        [torch.tensor(float(finished)) for _ in weights],  # torch adds 1 to each before it uses it
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _update_filled_up(rests: list[list[Tensor]], group: dict[str, Any], finished: int) -> None:
    """The same for less than a vector of each."""
    rests = [tensors for tensors in rests if tensors[0].numel()]
    filled = [[F.pad(tensor, (0, VECTOR_ELEMENTS - tensor.numel())) for tensor in tensors] for tensors in rests]
    _update(filled, group, finished)
    for tensors, results in zip(rests, filled, strict=True):
        for tensor, result in zip(tensors, results, strict=True):
            tensor.copy_(result[: tensor.numel()])


def use_in_optimizer(module: ModuleType) -> None:
    """megatron.core.optimizer, as it looks where a fused Adam is installed."""
    module.__dict__.update(Adam=GroupAdamW, USING_PYTORCH_OPTIMIZER=False)


def use_in_distributed_optimizer(module: ModuleType) -> None:
    """megatron.core.optimizer.distrib_optimizer likewise; apex's flag, because Transformer Engine's means more than its Adam."""
    module.__dict__.update(Adam=GroupAdamW, HAVE_APEX_OR_TE=True, USING_TE_OPTIMIZER=False, USING_APEX_OPTIMIZER=True)
