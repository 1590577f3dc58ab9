"""The KD loss with both output matmuls, forward and backward, beside ModelOpt's LogitsKLLoss and Liger's fused linear JSD: memory and time.

Llama-3.1-8B's teacher (hidden 4096) and its 4B student (3072), V = 128,256, bf16, 4,096 and 8,192 tokens. What is not installed is left out,
what fails is told with its reason. Liger's divergence is forward KL where its beta is 0. Memory: over the weights, hidden states and labels.
Values: every side's forward KL from fp64, on a few tokens of the same shape.

    bash benchmarks/gpu/run.sh loss                        # about 2 minutes
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from clock import failed, measured, release, reset_peak
from options import command_line, one_process
from writer import table, write

CHECKED_TOKENS = 256
PUBLISHED = (
    "Liger's own figures of fused_linear_jsd, forward and backward, hidden 4096 both, V = 128,256, bf16, on an H100 80GB (version 0.3.1, 2024-10-09: "
    "benchmark/data/all_benchmark_data.csv of linkedin/Liger-Kernel; memory as its script counts it): 4,096 tokens 144 ms and 6,392 MB, "
    "8,192 tokens 183 ms and 8,712 MB; torch's beside it 98 ms and 30,220 MB, 195 ms and 56,368 MB."
)


class Sizes(NamedTuple):
    tokens: tuple[int, ...]
    teacher: int
    student: int
    vocabulary: int
    checked: int


LARGE, TINY = Sizes((4096, 8192), 4096, 3072, 128_256, CHECKED_TOKENS), Sizes((64, 128), 48, 32, 640, 16)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--runs", type=int, default=20)
    asked = parser.parse_args()
    sizes = TINY if asked.tiny else LARGE
    with one_process(asked.device) as (world, layout):
        figures = {"time and memory": all_measured(sizes, world, layout, asked), "from fp64": from_fp64(sizes, world, layout)}
    write("loss", "The KD loss on one GPU", body(figures, sizes), figures, asked)


def body(figures: dict[str, Any], sizes: Sizes) -> list[str]:
    rows = [
        [side, f"{tokens:,}", f"{found['seconds'] * 1e3:.2f} ms", f"{found['over_gib']:.2f} GiB"]
        if "seconds" in found
        else [side, f"{tokens:,}", found["error"], "–"]
        for tokens, sides in figures["time and memory"].items()
        for side, found in sides.items()
    ]
    return [
        f"Hidden {sizes.teacher} (teacher) and {sizes.student}, {sizes.vocabulary:,} tokens in the vocabulary, bf16; forward and backward with both "
        "output matmuls, medians.",
        "",
        *table(("", "tokens", "time", "memory"), rows),
        "",
        f"Forward KL of {sizes.checked} tokens, relative distance from fp64 on the same bf16 tensors: "
        + ", ".join(f"{side} {told(found)}" for side, found in figures["from fp64"].items())
        + ".",
        "",
        PUBLISHED,
    ]


def told(found: dict[str, Any]) -> str:
    return f"{found['apart']:.1e}" if "apart" in found else f"failed ({found['error']})"


def all_measured(sizes: Sizes, world: Any, layout: Any, asked: argparse.Namespace) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for tokens in sizes.tokens:
        make, runs = partial(make_case, tokens, sizes, world, layout), 1 if asked.tiny else asked.runs
        found[tokens] = {side: attempted(step, make, world.platform, runs) for side, step in sides().items()}
    return found


def attempted(step: Callable[[Case], Any], make: Callable[[], Case], platform: Any, runs: int) -> dict[str, Any]:
    """On tensors of its own, so that no side's buffers are another's memory; where a side does not fit or fails, why."""
    case = make()
    try:
        found: dict[str, Any] = measured(partial(fresh, step, case), platform, runs=runs, held=reset_peak(platform)).to_dict()
    except Exception as error:
        found = failed(error)
    del case
    release(platform)
    return found


def fresh(step: Callable[[Case], Any], case: Case) -> None:
    """Without the gradients of the run before."""
    case.hidden_ND.grad = case.weight_VD.grad = None
    step(case)


def sides() -> dict[str, Callable[[Case], Any]]:
    found: dict[str, Callable[[Case], Any]] = {
        "ours, forward KL": partial(ours, loss="forward_kl"),
        "ours, Jensen–Shannon": partial(ours, loss="jensen_shannon"),
    }
    if importlib.util.find_spec("modelopt"):
        found["ModelOpt's LogitsKLLoss"] = modelopts
    if importlib.util.find_spec("liger_kernel"):
        found["Liger's fused linear JSD, forward KL"] = partial(ligers, beta=0.0)
        found["Liger's fused linear JSD, Jensen–Shannon"] = partial(ligers, beta=0.5)
    return found


@dataclass(frozen=True)
class Case:
    """Logits with a standard deviation of 3; the student's are not the teacher's. N tokens, V vocabulary, D, E hidden of student and teacher."""

    hidden_ND: Any
    weight_VD: Any
    teacher_NE: Any
    teacher_weight_VE: Any
    labels: Any
    group: Any
    buffer: Any


def make_case(tokens: int, sizes: Sizes, world: Any, layout: Any) -> Case:
    import torch

    from minitron_megatron.training.kd_loss import GradientBuffer
    from minitron_megatron.training.losses.target import TokenLabels

    dice, device = torch.Generator(world.platform.device).manual_seed(5), world.platform.device

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=dice)

    ids = torch.randint(sizes.vocabulary, (tokens,), device=device, generator=dice)
    return Case(
        draw(tokens, sizes.student).requires_grad_(),
        (draw(sizes.vocabulary, sizes.student) * (3 / sizes.student**0.5)).requires_grad_(),
        draw(tokens, sizes.teacher),
        draw(sizes.vocabulary, sizes.teacher) * (3 / sizes.teacher**0.5),
        TokenLabels(ids, torch.ones(tokens, device=device)),
        layout.groups.tp,
        GradientBuffer(),
    )


def ours(case: Case, *, loss: str) -> Any:
    """The function that the output layer calls, with its one gradient buffer; returns the loss, as every side does."""
    from minitron_megatron.training.kd_loss import fused_distillation_loss
    from minitron_megatron.training.losses.settings import LossSettings
    from minitron_megatron.training.losses.target import WeightedTarget

    targets, rows = [WeightedTarget(case.teacher_NE, case.teacher_weight_VE)], case.weight_VD.shape[0]
    settings = LossSettings({loss: 1.0})
    total, _ = fused_distillation_loss(
        case.hidden_ND, case.weight_VD, case.labels, targets, settings, rows=rows, group=case.group, buffer=case.buffer
    )
    total.backward()
    return total.detach()


def modelopts(case: Case) -> Any:
    """On whole logits [S, B = 1, V], as its distillation makes them."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    loss = LogitsKLLoss(TransformerConfig(num_layers=1, hidden_size=case.hidden_ND.shape[1], num_attention_heads=32))
    with torch.no_grad():
        teacher_logits = (case.teacher_NE @ case.teacher_weight_VE.t())[:, None]
    losses_BS, *_ = loss((case.hidden_ND @ case.weight_VD.t())[:, None], teacher_logits)
    total = losses_BS.sum()
    total.backward()
    return total.detach()


def ligers(case: Case, *, beta: float) -> Any:
    """beta 0: forward KL; 1/2: our Jensen–Shannon. Its value is a mean over tokens; here, as on every side, their sum."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    mean = LigerFusedLinearJSD(jsd_beta=beta)(case.hidden_ND, case.weight_VD, case.teacher_NE, case.teacher_weight_VE, None)
    mean.backward()
    return mean.detach() * len(case.hidden_ND)


def from_fp64(sizes: Sizes, world: Any, layout: Any) -> dict[str, dict[str, Any]]:
    """Relative distance of each side's forward KL from the definition, carried out in fp64, or why there is none."""
    from torch.nn import functional as F

    case = make_case(sizes.checked, sizes, world, layout)
    student, teacher = ((x.detach().double() @ w.detach().double().t()).log_softmax(-1) for x, w in pairs(case))
    exact = float(F.kl_div(student, teacher, log_target=True, reduction="sum"))
    del student, teacher
    release(world.platform)
    return {side: apart(step, case, exact) for side, step in sides().items() if "KL" in side}


def apart(step: Callable[[Case], Any], case: Case, exact: float) -> dict[str, Any]:
    try:
        return {"apart": abs(float(step(case)) - exact) / exact}
    except Exception as error:  # a package that is there and does not import, and a kernel that fails
        return failed(error)


def pairs(case: Case) -> list[tuple[Any, Any]]:
    return [(case.hidden_ND, case.weight_VD), (case.teacher_NE, case.teacher_weight_VE)]


if __name__ == "__main__":
    main()
