"""The fused distillation loss in bf16: value and gradients against whole fp64 logits, and the memory that it takes.

Legend: N tokens, V vocabulary, D hidden of both models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plain_losses import token_losses
from torch import Tensor

from minitron_megatron.training.kd_loss import GradientBuffer, fused_distillation_loss
from minitron_megatron.training.losses.settings import LossSettings
from minitron_megatron.training.losses.target import TokenLabels, WeightedTarget

from ..place import Place, place, relative
from ..setting import Setting

BF16_BYTES, FP32_BYTES = 2, 4


@dataclass(frozen=True)
class Case:
    """One micro-batch; logits of about the size that language models have."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_ND: Tensor
    teacher_VD: Tensor
    labels: TokenLabels

    @staticmethod
    def draw(here: Place, tokens: int, hidden: int, vocabulary: int) -> Case:
        device = here.platform.device
        generator = torch.Generator(device=device).manual_seed(6)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=here.dtype).mul_(scale)

        labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
        weight, teacher = (normal(vocabulary, hidden, scale=3 / hidden**0.5).detach() for _ in range(2))
        states, theirs = normal(tokens, hidden), normal(tokens, hidden)
        return Case(states.requires_grad_(), weight.requires_grad_(), theirs, teacher, TokenLabels(labels, torch.ones(tokens, device=device)))

    def fused(self, here: Place, memory_bytes: int) -> Tensor:
        settings = LossSettings({"forward_kl": 1.0}, memory_bytes=memory_bytes)
        targets = [WeightedTarget(self.teacher_ND, self.teacher_VD)]
        given: dict[str, Any] = {"rows": len(self.weight_VD), "group": here.layout.groups.tp, "buffer": GradientBuffer()}
        return fused_distillation_loss(self.hidden_ND, self.weight_VD, self.labels, targets, settings, **given)[0]

    def plain(self) -> tuple[float, Tensor, Tensor]:
        """Value and gradients of hidden states and weight, from whole fp64 logits."""
        hidden, weight = (x.detach().double().requires_grad_() for x in (self.hidden_ND, self.weight_VD))
        teacher = self.teacher_ND.double() @ self.teacher_VD.double().t()
        total = token_losses(hidden @ weight.t(), teacher)["forward_kl"].sum()
        return float(total), *torch.autograd.grad(total, (hidden, weight))


def against_plain(setting: Setting, folder: Path, *, tokens: int, hidden: int, vocabulary: int, memory_mib: int) -> dict[str, Any]:
    """Relative errors of value and gradients."""
    with place(setting) as here:
        case = Case.draw(here, tokens, hidden, vocabulary)
        total = case.fused(here, memory_mib << 20)
        total.backward()
        value, of_hidden, of_weight = case.plain()
        found = {"hidden": (case.hidden_ND.grad, of_hidden), "weight": (case.weight_VD.grad, of_weight)}
        errors = {name: relative(actual.detach(), expected) for name, (actual, expected) in found.items() if actual is not None}
        return {"value": abs(float(total.detach()) / value - 1), **errors}


def peak(setting: Setting, folder: Path, *, tokens: int, hidden: int, vocabulary: int, memory_mib: int) -> dict[str, Any]:
    """Peak bytes over what is there before, forward and backward into a main_grad as under DDP; beside it what is to be expected."""
    with place(setting) as here:
        case = Case.draw(here, tokens, hidden, vocabulary)
        case.weight_VD.main_grad = torch.zeros(vocabulary, hidden, device=here.platform.device)  # type: ignore[attr-defined]
        passes = [_pass_peak(here, case, memory_mib << 20) for _ in range(2)]
        return {"peak": passes[-1], "expected": expected_bytes(tokens, hidden, vocabulary, memory_mib << 20)}


def expected_bytes(tokens: int, hidden: int, vocabulary: int, memory_bytes: int) -> int:
    """Chunks of logits, the fp32 gradient of the weight, that of the hidden states, and a bf16 product (then DDP's dummy) as large as the weight."""
    return memory_bytes + vocabulary * hidden * (FP32_BYTES + BF16_BYTES) + tokens * hidden * BF16_BYTES


def _pass_peak(here: Place, case: Case, memory_bytes: int) -> int:
    """The first pass compiles; whoever wants figures takes the second."""
    case.hidden_ND.grad = case.weight_VD.grad = None
    if here.platform.kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.fused(here, memory_bytes).backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from distributed.watched_tensors import PeakMemory

    with PeakMemory() as watched:
        case.fused(here, memory_bytes).backward()
    return watched.peak
