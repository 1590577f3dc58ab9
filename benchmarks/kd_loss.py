"""Time and peak memory of the KD loss with both output matmuls, forward and backward, beside ModelOpt's LogitsKLLoss on the same tensors.

Ours is the output layer that the training loop calls. One process with two threads, then two tensor ranks with one each.
Memory: growth of the process's resident peak over what it held with the weights and hidden states, in the first run of each side.
The allocator is the system's, as it comes; --allocator launcher: with the settings that our launcher gives to workers, under which
memory comes back from the heap without page faults, for the peer as well. On a GPU: benchmarks/gpu/loss.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

from common import write_result
from peer import DISTILLATION, ROOT, in_peer_environment

TOKENS, VOCABULARY, STUDENT, TEACHER, RUNS = 4096, 128_256, 512, 768, 5
FEW_TOKENS = 512
"""For what is checked and not timed: bf16, and the top-K gradients."""
TOP_K = 100


def main() -> None:
    if sys.argv[1:2] == ["rank"]:
        return measure(*sys.argv[2:])
    asked = arguments()
    in_peer_environment()
    figures: dict[str, Any] = {f"tp{size}": run("compare", size, asked.allocator, str(asked.runs), str(asked.tokens)) for size in asked.tensor}
    figures["top_k_gradient"] = top_k_gradients(asked.allocator)
    name = "kd_loss" if asked.allocator == "system" else f"kd_loss_{asked.allocator}"
    write_result(name, "The fused KD loss beside ModelOpt's", text(figures, asked), figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 2], help="tensor ranks")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--allocator", choices=["system", "launcher"], default="system")
    return parser.parse_args()


def text(figures: dict[str, Any], asked: argparse.Namespace) -> str:
    layouts = {name: x for name, x in figures.items() if name.startswith("tp")}
    rows = []
    for name, x in layouts.items():
        rows += [f"| {name.upper()} | {side} | {x['seconds'][side]:.2f} s | {x['peak_mb'][side]:,.0f} MB |" for side in SIDES]
        rows.append(f"| {name.upper()} | **ratio** | **{x['time_ratio']:.2f}** | **{x['peak_ratio']:.3f}** |")
    return "\n".join(
        [
            f"{asked.tokens:,} tokens, {VOCABULARY:,} tokens in the vocabulary, hidden {TEACHER} (teacher) and {STUDENT}, fp32; forward and backward "
            f"with both output matmuls; medians of {asked.runs} alternating runs, the slowest rank's; the largest rank's peak in the first run. "
            f"Allocator: {asked.allocator}. Peer: nvidia-modelopt {DISTILLATION}.",
            "",
            "| layout | | time | peak memory |",
            "|---|---|--:|--:|",
            *rows,
            "",
            f"Differences between the two, relative (gradients: norms); bf16, and each one from fp64, on {FEW_TOKENS} tokens:",
            "",
            *(f"- {name.upper()}, {dtype}: {told(x['apart'][dtype])}" for name, x in layouts.items() for dtype in x["apart"]),
            *(f"- {side} in fp32 from fp64, one process: {told(layouts['tp1']['from_fp64'][side])}" for side in SIDES if "tp1" in layouts),
            "",
            f"Gradient of the student's hidden states under TP=2 over that of one process, forward KL to the {TOP_K} likeliest tokens: "
            f"ours {figures['top_k_gradient']['ours']:.6f}, the peer's TopKLogitsKLLoss {figures['top_k_gradient']['peer']:.6f}. Exact is 1.",
        ]
    )


def told(apart: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in apart.items())


def top_k_gradients(allocator: str) -> dict[str, float]:
    """Each side's gradient of the hidden states under TP=2 over its own under one process: the norm's ratio."""
    found = [run("top_k", processes, allocator) for processes in (1, 2)]
    return {side: found[1][side] / found[0][side] for side in SIDES}


def run(what: str, processes: int, allocator: str, *given: str) -> dict[str, Any]:
    """Fresh processes; rank 0's figures, which are those of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, "rank", what, folder, str(processes)]
        environment = {**os.environ, **of_worker(processes, allocator), "PYTHONPATH": str(ROOT)}
        started = [subprocess.Popen([*command, str(rank), *given], env=environment, stdout=subprocess.PIPE) for rank in range(processes)]
        told = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{what} in {processes} processes failed")
    found: dict[str, Any] = json.loads(told[0].splitlines()[-1])
    print(what, f"TP={processes}", found, flush=True)
    return found


def of_worker(processes: int, allocator: str) -> dict[str, str]:
    """The launcher's settings, all of them or those of threads alone."""
    from minitron_megatron.launcher import worker_environment

    settings = worker_environment(processes)
    return {name: value for name, value in settings.items() if allocator == "launcher" or name.startswith(("OMP", "GOMP"))}


class Case(NamedTuple):
    """One rank's tensors; hidden states are whole."""

    layer: Any
    """The student's DistillationOutputLayer; called without labels it is megatron's ColumnParallelLinear."""
    hidden: Any
    teacher_hidden: Any
    teacher_weight: Any
    labels: Any
    config: Any
    group: Any


def measure(what: str, folder: str, processes: str, rank: str, *given: str) -> None:
    """One process of one run: prints its figures."""
    from minitron_megatron.platform import activate, retarget

    platform = activate("cpu")
    retarget.install(("modelopt.torch",))
    import torch.distributed as dist

    from minitron_megatron.config.parallel import Parallel
    from minitron_megatron.parallel.layout import global_layout
    from minitron_megatron.parallel.world import World

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(processes))
    group = global_layout(Parallel(tensor=int(processes)), World(platform, int(rank), int(processes))).groups.tp
    import modelopt.torch.distill.plugins.megatron  # noqa: F401 - before anything is measured

    print(json.dumps({"compare": compare, "top_k": top_k_norms}[what](group, *given)))
    dist.destroy_process_group()


def compare(group: Any, runs: str, tokens: str) -> dict[str, Any]:
    """Peaks of the first runs, medians of the alternating ones behind them, and how far apart values and gradients are."""
    import torch

    case = make_case(group, int(tokens), torch.float32)
    peaks: dict[str, float] = {}
    apart = {"float32": differences(case, peaks), "bfloat16": differences(make_case(group, FEW_TOKENS, torch.bfloat16))}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(int(runs)):
        for side, step in SIDES.items():
            seconds[side].append(largest(timed(step, case), group))
    medians = {side: median(found) for side, found in seconds.items()}
    peaks = {side: largest(peak, group) for side, peak in peaks.items()}
    ratios = {"time_ratio": medians["ours"] / medians["peer"], "peak_ratio": peaks["ours"] / peaks["peer"]}
    found = {**ratios, "seconds": medians, "peak_mb": peaks, "runs": seconds, "apart": apart}
    return found | ({"from_fp64": from_fp64(make_case(group, FEW_TOKENS, torch.float32))} if group.size() == 1 else {})


def timed(step: Callable[[Case], Any], case: Case) -> float:
    import torch.distributed as dist

    forget_gradients(case)
    dist.barrier()
    started = time.monotonic()
    step(case)
    return time.monotonic() - started


def largest(value: float, group: Any) -> float:
    """Of all ranks."""
    import torch
    import torch.distributed as dist

    found = torch.tensor([value])
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return float(found)


def differences(case: Case, peaks: dict[str, float] | None = None) -> dict[str, float]:
    """Ours against the peer's; peaks get each side's, in MB."""
    from prune_memory import reset_peak, resident

    found = {}
    for side, step in SIDES.items():
        before = reset_peak()
        found[side] = outcome(case, step)
        if peaks is not None:
            peaks[side] = (resident("VmHWM") - before) / 1e6
    return apart_from(found["ours"], found["peer"])


def from_fp64(case: Case) -> dict[str, dict[str, float]]:
    """Each side against the definition, carried out in fp64."""
    import torch
    from torch.nn import functional as F

    hidden, weight = (x.detach().double().requires_grad_() for x in (case.hidden, case.layer.weight))
    wanted = F.log_softmax(case.teacher_hidden.double() @ case.teacher_weight.double().t(), dim=-1)
    loss = F.kl_div(F.log_softmax(hidden @ weight.t(), dim=-1), wanted, log_target=True, reduction="sum")
    exact = Outcome(float(loss.detach()), *torch.autograd.grad(loss, (hidden, weight)))
    return {side: apart_from(outcome(case, step), exact) for side, step in SIDES.items()}


class Outcome(NamedTuple):
    loss: float
    hidden_gradient: Any
    weight_gradient: Any


def outcome(case: Case, step: Callable[[Case], float]) -> Outcome:
    forget_gradients(case)
    return Outcome(step(case), case.hidden.grad, case.layer.weight.grad)


def apart_from(found: Outcome, wanted: Outcome) -> dict[str, float]:
    """Relative differences: of the loss, and the norms of what is between the gradients over those of the gradients."""
    apart = {"loss": abs(found.loss - wanted.loss) / abs(wanted.loss)}
    for name in ("hidden_gradient", "weight_gradient"):
        own, other = getattr(found, name).double(), getattr(wanted, name).double()
        apart[name.replace("_", " ")] = float((own - other).norm() / other.norm())
    return apart


def top_k_norms(group: Any) -> dict[str, float]:
    """Norm of the hidden states' gradient of each side's top-K loss. Ours has one class for all other tokens, the peer's has none."""
    import torch
    from modelopt.torch.distill.plugins.megatron import TopKLogitsKLLoss

    case, norms = make_case(group, FEW_TOKENS, torch.float32), {}
    for side in ("ours", "peer"):
        forget_gradients(case)
        ours(case, top_k=TOP_K) if side == "ours" else peer(case, TopKLogitsKLLoss(case.config, top_k=TOP_K))
        norms[side] = float(case.hidden.grad.norm())
    return norms


def ours(case: Case, *, top_k: int | None = None) -> float:
    """As training/student.py calls it: the sum of the tokens' forward KL."""
    from minitron_megatron.training.losses.settings import LossSettings
    from minitron_megatron.training.losses.target import WeightedTarget

    target = WeightedTarget(case.teacher_hidden.flatten(0, 1), case.teacher_weight)
    rows = case.layer.weight.shape[0]
    total, _ = case.layer(case.hidden, labels=case.labels, targets=[target], settings=LossSettings(top_k=top_k), rows=rows)
    total.backward()
    return float(total.detach())


def peer(case: Case, loss: Any = None) -> float:
    """The loss class on the logits of both; its ranks' parts are summed as Megatron-LM's loss_func does."""
    import torch
    import torch.distributed as dist
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    with torch.no_grad():
        teacher_logits = case.teacher_hidden @ case.teacher_weight.t()
    logits, _ = case.layer(case.hidden)
    losses_BS, tp_reduce, _ = (loss or LogitsKLLoss(case.config))(logits, teacher_logits)
    del logits, teacher_logits
    total = losses_BS.sum()
    total.backward()
    value = total.detach()
    if tp_reduce:
        dist.all_reduce(value, group=case.group)
    return float(value)


SIDES = {"ours": ours, "peer": peer}


def forget_gradients(case: Case) -> None:
    case.hidden.grad = case.layer.weight.grad = None


def make_case(group: Any, tokens: int, dtype: Any) -> Case:
    """Logits with a standard deviation of 3 for the teacher; the student's are partly the teacher's."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from minitron_megatron.training.losses.target import TokenLabels
    from minitron_megatron.training.output_layer import DistillationOutputLayer

    generator = torch.Generator().manual_seed(5)
    rows = VOCABULARY // group.size()
    teacher_weight = torch.empty(VOCABULARY, TEACHER).normal_(0, 3 / TEACHER**0.5, generator=generator)
    teacher_weight = teacher_weight[group.rank() * rows :][:rows].to(dtype, copy=True)
    teacher_hidden = torch.randn(tokens, 1, TEACHER, generator=generator)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=STUDENT,
        num_attention_heads=8,
        tensor_model_parallel_size=group.size(),
        params_dtype=dtype,
        use_cpu_initialization=True,
    )
    layer = DistillationOutputLayer(STUDENT, VOCABULARY, config=config, init_method=lambda weight: None, bias=False, tp_group=group)
    with torch.no_grad():
        layer.weight.copy_(teacher_weight[:, :STUDENT])
    hidden = (teacher_hidden[..., :STUDENT] + torch.randn(tokens, 1, STUDENT, generator=generator) / 2).to(dtype).requires_grad_()
    labels = TokenLabels(torch.randint(VOCABULARY, (tokens,), generator=generator), torch.ones(tokens))
    return Case(layer, hidden, teacher_hidden.to(dtype), teacher_weight, labels, config, group)


if __name__ == "__main__":
    main()
