"""The memory that `minitron plan` counts in closed form, beside what a distillation step holds, in thirteen shapes and layouts on CPU processes.

Claims: weights, gradients and optimizer state of every rank to the byte; what a forward pass keeps for backward, and the fullest moment of a
whole step (teacher, student, loss, optimizer) within a tenth. Measured is the second step, by an account of allocations: every storage that an
operation of torch makes is counted from then until it is freed (TorchDispatchMode, as in tests/distributed/watched_tensors.py), on top of all
storages that were there before.
That sees neither what one operation allocates and frees within itself nor the heap's own losses; the growth of the process's resident peak, which
contains both, stands beside it. What is kept: the storages that autograd's saved-tensor hooks get in the forward pass of a chunk, each once, without
those that were there before.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import write_result

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
FIELDS = ("kept", "peak")


@dataclass(frozen=True)
class Shape:
    """One measurement: values of a recipe's sections."""

    student: dict[str, Any]
    teacher: dict[str, Any] = field(default_factory=dict)
    """What it has beyond the student's sizes."""
    parallel: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    precision: str = "bf16"


LLAMA = {
    "family_name": "llama",
    "layers": 5,
    "hidden": 384,
    "heads": 12,
    "kv_groups": 4,
    "head_channels": 32,
    "ffn": 1024,
    "vocab": 8003,
    "tied_embeddings": False,
    "max_positions": 4096,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
QWEN = {**LLAMA, "family_name": "qwen3", "tied_embeddings": True, "head_channels": 48}
NEMOTRON = {**LLAMA, "family_name": "nemotron", "rotary_share": 0.5, "kv_groups": 12}
WIDER = {"layers": 6, "hidden": 512, "ffn": 1536}
LONG, SHORT = {"sequence_length": 640}, {"sequence_length": 256}
SHAPES = {
    "one process, fp32": Shape(LLAMA, WIDER, precision="fp32", distill=LONG),
    "one process": Shape(LLAMA, WIDER, distill=LONG),
    "short sequences": Shape(LLAMA, WIDER, distill={**SHORT, "micro_batch": 4, "global_batch": 8}),
    "tied, Qwen3, selective": Shape(QWEN, WIDER, distill=LONG, training={"recompute": "selective"}),
    "Nemotron, fp32": Shape(NEMOTRON, WIDER, distill=LONG, precision="fp32"),
    "full recompute": Shape({**LLAMA, "layers": 8}, WIDER | {"layers": 9}, distill={**LONG, "global_batch": 8}, training={"recompute": "full"}),
    "hidden states too": Shape(LLAMA, WIDER, distill={**LONG, "hidden": {"pairs": [[2, 1], [4, 3]]}}),
    "TP2, sequence parallel": Shape(LLAMA, WIDER, {"tensor": 2, "sequence": True}, LONG),
    "TP2, fp32": Shape(LLAMA, WIDER, {"tensor": 2}, LONG, precision="fp32"),
    "PP2, tied, teacher whole": Shape({**LLAMA, "tied_embeddings": True}, WIDER, {"pipeline": 2}, {**LONG, "global_batch": 8, "micro_batch": 1}),
    "PP2 × VPP2": Shape(LLAMA, WIDER, {"pipeline": 2, "virtual": 2, "teacher": "student"}, {**LONG, "global_batch": 8, "micro_batch": 1}),
    "DP2, distributed optimizer": Shape(LLAMA, WIDER, {"data": 2}, LONG, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2 × PP2": Shape(LLAMA, WIDER, {"tensor": 2, "pipeline": 2, "sequence": True, "teacher": "student"}, {**LONG, "global_batch": 8}),
}


def main() -> None:
    wanted = [name for name in SHAPES if not sys.argv[1:] or any(word in name for word in sys.argv[1:])]
    figures = {name: of_shape(name) for name in wanted}
    if wanted == list(SHAPES):
        write_result("plan_memory", "The memory that `minitron plan` counts, beside what a step holds", text(figures), figures)


def of_shape(name: str) -> list[dict[str, Any]]:
    """Counted and measured bytes of every rank."""
    ranks = run(name)
    for number, rank in enumerate(ranks):
        told = {key: f"{rank['counted'][key] / MIB:.1f} / {rank['measured'][key] / MIB:.1f} MiB {deviation(rank, key):+.1%}" for key in FIELDS}
        print(f"{name}, rank {number}:", told, f"exact: {is_exact(rank)}", flush=True)
        if not is_exact(rank):
            print("  counted", rank["counted"]["exact"], "\n  measured", rank["measured"]["exact"], flush=True)
    return ranks


def run(name: str) -> list[dict[str, Any]]:
    """In fresh processes, with the environment that the launcher gives to its workers."""
    from minitron_megatron.config.parallel import Parallel
    from minitron_megatron.launcher import worker_environment

    size = Parallel(**SHAPES[name].parallel).processes
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **worker_environment(size), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        commands = [[sys.executable, __file__, "--worker", name, folder, str(rank), str(size)] for rank in range(size)]
        started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for command in commands]
        told = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{name} failed")
    return [json.loads(line.splitlines()[-1]) for line in told]


def is_exact(rank: dict[str, Any]) -> bool:
    return rank["counted"]["exact"] == rank["measured"]["exact"]


def deviation(rank: dict[str, Any], key: str) -> float:
    return rank["counted"][key] / rank["measured"][key] - 1


def text(figures: dict[str, list[dict[str, Any]]]) -> str:
    header = [
        "shape",
        "weights, gradients, optimizer, teacher",
        "kept for backward, counted",
        "measured",
        "",
        "fullest moment, counted",
        "measured",
        "",
    ]
    header += ["resident peak's growth"]
    rows = ["| " + " | ".join(header) + " |", "|---|--:|" + "--:|" * (len(header) - 2)]
    for name, ranks in figures.items():
        rank = max(ranks, key=lambda one: one["measured"]["peak"])
        exact = "to the byte" if all(map(is_exact, ranks)) else "**differ**"
        cells = [name, f"{sum(rank['measured']['exact'].values()) / MIB:.1f}, {exact}"]
        for key in FIELDS:
            cells += [f"{rank[side][key] / MIB:.1f}" for side in ("counted", "measured")]
            cells.append(f"{max((deviation(one, key) for one in ranks), key=abs):+.1%}")
        rows.append("| " + " | ".join([*cells, f"{rank['measured']['resident'] / MIB:.0f}"]) + " |")
    worst = {key: max((abs(deviation(one, key)) for ranks in figures.values() for one in ranks), default=0.0) for key in FIELDS}
    return "\n".join(
        [
            f"{len(figures)} shapes. MiB of the rank with the highest peak; percentages: the largest deviation of any rank, counted over measured.",
            f"Largest of all: kept {worst['kept']:.1%}, fullest moment {worst['peak']:.1%}. Exact figures hold for every rank.",
            "CPU kernels; what differs on a GPU (fused gate, flash attention) is not measured.",
            "",
            *rows,
        ]
    )


def worker(name: str, folder: str, rank: str, size: str) -> None:
    """One process: two steps, of which the second is measured; prints its figures."""
    from minitron_megatron.platform import activate

    platform = activate("cpu")
    import torch
    import torch.distributed as dist
    from plan_account import Account, KeptBytes, living_bytes
    from plan_step import build, counted, exact_bytes
    from prune_memory import reset_peak, resident

    from minitron_megatron.parallel.world import World

    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(size))
    world, shape = World(platform, int(rank), int(size)), SHAPES[name]
    before = reset_peak()
    loop = build(shape, world)
    loop._step(0)
    gc.collect()
    there = living_bytes()
    with KeptBytes(loop.student.model.chunks) as kept, Account() as account:
        loop._step(1)
    measured = {"exact": exact_bytes(loop), "kept": max(kept.found), "peak": there + account.peak, "resident": resident("VmHWM") - before}
    print(json.dumps({"counted": counted(shape, loop), "measured": measured, "lasting": there}))
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
