"""Curves of what computes: the KD loss, a distillation step, the importance pass. All sizes of a model but one stay as they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from growth.curve import Curve, Work

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, write_torch_dist
from minitron_megatron.config.distill import Distill
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.data.batches import collate
from minitron_megatron.distill.teacher import load_teacher
from minitron_megatron.distill.teachers import Teachers
from minitron_megatron.importance.stage import measure
from minitron_megatron.model.build import build_model
from minitron_megatron.parallel.layout import Layout, global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.platform import activate
from minitron_megatron.training.kd_loss import fused_distillation_loss
from minitron_megatron.training.loop import TrainingLoop
from minitron_megatron.training.losses.settings import LossSettings
from minitron_megatron.training.losses.target import TokenLabels, WeightedTarget
from minitron_megatron.training.output_layer import DistillationOutputLayer
from minitron_megatron.training.student import make_student

SMALL = Architecture("llama", 4, 128, 4, 2, 32, 512, 2048, True, 8192, 1e-5, 10000.0)
QUADRATIC_ATTENTION = "causal attention: each token attends to all before it; at these lengths it outgrows the matrices"


class RandomSamples:
    """Samples of random tokens, the same for an id."""

    def __init__(self, samples: int, sequence: int) -> None:
        self._tokens = torch.randint(SMALL.vocab, (samples, sequence + 1), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, sample_id: int) -> torch.Tensor:
        return self._tokens[sample_id]


def one_process() -> tuple[World, Layout]:
    platform = activate("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = World(platform)
    return world, global_layout(Parallel(), world)


def loss(size: int, folder: Path, *, quantity: str) -> Work:
    """The function that the training loop calls, forward and backward."""
    sizes = {"tokens": 256, "vocabulary": 8192, "hidden": 256, "K": 0, quantity: size}
    if quantity == "K":
        sizes["vocabulary"] = 32768
    one_process()
    tokens, rows, hidden = sizes["tokens"], sizes["vocabulary"], sizes["hidden"]
    states, weight = (torch.randn(count, hidden).mul_(0.2).requires_grad_() for count in (tokens, rows))
    teacher = WeightedTarget(torch.randn(tokens, hidden) * 0.2, torch.randn(rows, hidden) * 0.2, 1.0)
    labels = TokenLabels(torch.randint(rows, (tokens,)), torch.ones(tokens))
    settings = LossSettings(top_k=sizes["K"] or None)

    def work() -> None:
        states.grad = weight.grad = None
        total, _ = fused_distillation_loss(states, weight, labels, [teacher], settings, rows=rows, group=dist.group.WORLD)
        total.backward()

    return work


def step(size: int, folder: Path, *, quantity: str) -> Work:
    """One step of the loop: teacher forward, student forward and backward, optimizer; micro-batches of one sample."""
    arch, samples, sequence = _model_and_text(size, quantity)
    world, layout = one_process()
    settings = Distill(steps=1000, sequence_length=sequence, global_batch=samples, micro_batch=1)
    write_random(folder / "model", arch)
    source = MegatronSource(folder / "model", arch)
    teacher = load_teacher(source, folder / "model", layout, layout, world.platform, torch.float32, budget_bytes=1e12)
    model = build_model(arch, layout, world.platform, torch.float32, output_layer=DistillationOutputLayer, trainable=True)
    load_model(model, folder / "model")
    text = RandomSamples(samples, sequence)
    loop = TrainingLoop("distill", settings, layout, world, Teachers([teacher]), make_student(model, settings), text, text)

    def work() -> None:
        loop.progress = type(loop.progress)()
        loop._step(0)

    return work


def importance(size: int, folder: Path, *, quantity: str) -> Work:
    arch, samples, sequence = _model_and_text(size, quantity)
    world, layout = one_process()
    model = build_model(arch, layout, world.platform, torch.float32, output_layer=None)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    text = RandomSamples(samples, sequence)
    batches = [collate(text, [sample]) for sample in range(samples)]
    return lambda: measure(model, batches, lambda: None)


def _model_and_text(size: int, quantity: str) -> tuple[Architecture, int, int]:
    """Architecture, samples of a batch and tokens of a sample."""
    if quantity == "tokens of a sample":
        return SMALL.resized(ffn=128), 1, size  # a narrow FFN: what grows with the square of the length is not to be hidden by it
    if quantity == "samples":
        return SMALL, size, 128
    return SMALL.resized(**{quantity: size}), 8, 128


def write_random(folder: Path, arch: Architecture) -> None:
    def draw(row: TensorRow, rows: range | None = None) -> torch.Tensor:
        shape = row.shape(arch)
        return torch.randn(len(rows) if rows is not None else shape[0], *shape[1:]).mul_(0.02)

    write_torch_dist(folder, tensor_table(arch), arch, dtype=lambda row: torch.float32, read=draw)


def _curves(work: str, prepare: Any, ranges: dict[str, tuple[int, ...]]) -> list[Curve]:
    why = {"tokens of a sample": QUADRATIC_ATTENTION}
    return [Curve(work, quantity, sizes, partial(prepare, quantity=quantity), why.get(quantity, "")) for quantity, sizes in ranges.items()]


MODEL_SIZES = {
    "layers": (4, 8, 16, 32, 64),
    "hidden": (256, 512, 1024, 2048),
    "ffn": (512, 1024, 2048, 4096, 8192),
    "samples": (4, 8, 16, 32, 64),
    "tokens of a sample": (256, 512, 1024, 2048, 4096),
}
CURVES = [
    *_curves(
        "KD loss",
        loss,
        {
            "tokens": (256, 512, 1024, 2048, 4096),
            "vocabulary": (4096, 8192, 16384, 32768, 65536),
            "hidden": (256, 512, 1024, 2048, 4096),
            "K": (64, 256, 1024, 4096, 16384),
        },
    ),
    *_curves("distillation step", step, MODEL_SIZES),
    *_curves("importance pass", importance, MODEL_SIZES),
]
