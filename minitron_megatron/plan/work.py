"""Multiply-adds of a micro-batch through the parts of a model, on one tensor rank; counted as two, causal attention over half of the sequence."""

from __future__ import annotations

from dataclasses import dataclass

from minitron_megatron.arch.architecture import forward_flops_per_token, layer_costs, output_cost
from minitron_megatron.plan.activations import Pass, kept_by_layer
from minitron_megatron.plan.loss import FP32
from minitron_megatron.search.latency import visible


@dataclass(frozen=True)
class Work:
    """Of one pass: matrix products in bf16, bytes that everything else reads and writes, and matrix products in FP8."""

    flops: float
    bytes: float
    fp8_flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.fp8_flops + other.fp8_flops)

    def times(self, factor: float) -> Work:
        return Work(self.flops * factor, self.bytes * factor, self.fp8_flops * factor)


NOTHING = Work(0.0, 0.0)
PASSES_OVER_LOGITS = 6
"""Written by their product, read for the sums, read and written for the gradient, read by both of its products."""


def layer_forward(run: Pass, layer: int) -> Work:
    """What a layer keeps is written once and read once, and its weights are read."""
    arch, tensor = run.split.arch, run.split.tensor
    matrices, neurons = layer_costs(arch)[layer], arch.ffn_width(layer)
    weights = (matrices * arch.experts // arch.experts_per_token if arch.experts else matrices) // tensor
    plain = Pass(run.split, run.samples, run.sequence, run.width, "none", run.kernels)
    products, other = 2 * run.tokens * matrices / tensor, attention_flops(run)
    if not layer_in_fp8(run, layer):
        return Work(products + other, 2.0 * kept_by_layer(plain, neurons) + weights * run.width)
    return Work(other, 2.0 * kept_by_layer(plain, neurons) + weights + _cast(run, layer), products)


def layer_in_fp8(run: Pass, layer: int) -> bool:
    return run.fp8 is not None and run.fp8.covers(layer, run.split.arch.layers)


def _cast(run: Pass, layer: int) -> float:
    """Bytes that quantizing the inputs of a layer's four products moves: read once, tensorwise scaling twice, written along rows and columns."""
    arch, tensor = run.split.arch, run.split.tensor
    channels = 2 * arch.hidden + (arch.heads * arch.head_channels + arch.ffn_width(layer) * max(arch.experts_per_token, 1)) / tensor
    reads = 2 if run.fp8 and run.fp8.scaling == "tensorwise" else 1
    return run.tokens * channels * (reads * run.width + 2)


def attention_flops(run: Pass) -> float:
    """Of a layer: scores and weighted values, over half of what a token could see."""
    arch = run.split.arch
    return 2 * run.tokens * arch.heads * arch.head_channels / run.split.tensor * visible(arch, run.sequence)


def layer_backward(run: Pass, layer: int) -> Work:
    """Two products for each of the forward pass; and what is computed again."""
    forward = layer_forward(run, layer)
    if run.recompute == "none":
        return forward.times(2)
    if run.recompute == "full":
        return forward.times(3)
    arch = run.split.arch
    ffn = (3 if arch.family.is_gated else 2) * arch.hidden * arch.ffn_width(layer) * max(arch.experts_per_token, 1)
    again, moved = 2 * run.tokens * ffn / run.split.tensor, 2.0 * run.of_neurons(arch.ffn_width(layer))
    return forward.times(2) + (Work(0.0, moved, again) if layer_in_fp8(run, layer) else Work(again, moved))


def loss_work(run: Pass, *, products: int = 3) -> Work:
    """Logits of the trained model and both gradients of its output layer, products=1: logits alone."""
    rows = run.split.vocabulary_rows
    flops = 2 * products * run.tokens * rows * run.split.arch.hidden
    return Work(float(flops), run.tokens * rows * run.width * PASSES_OVER_LOGITS / 3 * products + rows * run.split.arch.hidden * FP32)


def model_flops(run: Pass, tokens: int, *, passes: int, output: bool = True) -> float:
    """Of a whole model over so many tokens, passes=3 in training: what the task asks for, recomputation left out."""
    arch = run.split.arch
    per_token = forward_flops_per_token(arch, int(visible(arch, run.sequence)))
    return float(passes * tokens * (per_token - (0 if output else 2 * output_cost(arch))))
