"""kd_loss.py --device cuda: the same comparison on a GPU in bf16, with Liger's fused linear JSD beside it where liger-kernel is installed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from common import write_result

TOKENS, HIDDEN, VOCABULARY, RUNS = 8192, 4096, 128_256, 7


def main() -> None:
    from minitron_megatron.platform import activate

    activate("cuda")
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    case = make_case(dist.group.WORLD)
    figures = {name: measured(step, case) for name, step in sides().items()}
    rows = [f"| {name} | {x['seconds'] * 1e3:.1f} ms | {x['peak_gb']:.2f} GB |" for name, x in figures.items()]
    head = (
        f"{TOKENS:,} tokens, hidden {HIDDEN} both, {VOCABULARY:,} tokens in the vocabulary, bf16, one GPU; forward and backward, medians of {RUNS}."
    )
    write_result("kd_loss_cuda", "The fused KD loss on a GPU", "\n".join([head, "", "| | time | peak memory |", "|---|--:|--:|", *rows]), figures)
    dist.destroy_process_group()


def sides() -> dict[str, Callable[[dict[str, Any]], None]]:
    found: dict[str, Callable[[dict[str, Any]], None]] = {
        "ours, forward KL": lambda case: ours(case, {"forward_kl": 1.0}),
        "ours, Jensen–Shannon": lambda case: ours(case, {"jensen_shannon": 1.0}),
    }
    if importlib.util.find_spec("modelopt"):
        found["ModelOpt's LogitsKLLoss"] = modelopts
    if importlib.util.find_spec("liger_kernel"):
        found["Liger's fused linear JSD"] = ligers
    return found


def measured(step: Callable[[dict[str, Any]], None], case: dict[str, Any]) -> dict[str, float]:
    """Peak over the weights and hidden states, of a run behind the one that compiles; then the time."""
    import torch

    seconds = []
    for number in range(RUNS + 2):
        case["hidden"].grad = case["weight"].grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated(), time.monotonic()
        step(case)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        seconds += [time.monotonic() - started] if number >= 2 else []
    return {"seconds": median(seconds), "peak_gb": peak / 1e9}


def make_case(group: Any) -> dict[str, Any]:
    import torch

    from minitron_megatron.training.kd_loss import GradientBuffer
    from minitron_megatron.training.losses.target import TokenLabels

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    labels = TokenLabels(torch.randint(VOCABULARY, (TOKENS,), device="cuda"), torch.ones(TOKENS, device="cuda"))
    weight, teacher_weight = ((draw(VOCABULARY, HIDDEN) * (3 / HIDDEN**0.5)) for _ in range(2))
    return {
        "hidden": draw(TOKENS, HIDDEN).requires_grad_(),
        "weight": weight.requires_grad_(),
        "teacher_hidden": draw(TOKENS, HIDDEN),
        "teacher_weight": teacher_weight,
        "labels": labels,
        "group": group,
        "buffer": GradientBuffer(),
    }


def ours(case: dict[str, Any], weights: dict[str, float]) -> None:
    from minitron_megatron.training.kd_loss import fused_distillation_loss
    from minitron_megatron.training.losses.settings import LossSettings
    from minitron_megatron.training.losses.target import WeightedTarget

    targets = [WeightedTarget(case["teacher_hidden"], case["teacher_weight"])]
    given = {"rows": VOCABULARY, "group": case["group"], "buffer": case["buffer"]}
    total, _ = fused_distillation_loss(case["hidden"], case["weight"], case["labels"], targets, LossSettings(weights), **given)
    total.backward()


def modelopts(case: dict[str, Any]) -> None:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    loss = LogitsKLLoss(TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=32))
    with torch.no_grad():
        teacher_logits = (case["teacher_hidden"] @ case["teacher_weight"].t())[:, None]
    losses_BS, *_ = loss((case["hidden"] @ case["weight"].t())[:, None], teacher_logits)
    losses_BS.sum().backward()


def ligers(case: dict[str, Any]) -> None:
    """Half of the mean of both distributions, as our Jensen–Shannon divergence."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    LigerFusedLinearJSD(jsd_beta=0.5)(case["hidden"], case["weight"], case["teacher_hidden"], case["teacher_weight"], None).backward()
