"""What a forward pass keeps for the backward pass, and what a pass needs beside that while it runs, in closed form.

Counted as in arXiv 2205.05198, section 4 (tensor and sequence parallelism as in its equations 2 to 5), for the layers that model/build.py makes: no
dropout and so no masks, no attention scores, gated or squared-ReLU FFN, grouped keys and values.

Legend, of one rank: N tokens of a micro-batch, n of them between the tensor-parallel regions (N / t under sequence parallelism), D hidden, h query
heads, g key/value groups, K head channels, f neurons of the layer's FFN, b bytes of a value.

    kept by a layer                                            values of b bytes a token
    input of both norms, output of both                        4 n D   (and 4 bytes a token and norm for what they divided by)
    fused QKV, of which the values are a view                  N (h + 2g) K
    queries and keys, rotated; the attention's output          N (2h + g) K
    normed queries and keys (Qwen3): queries ahead of it       N h K
    FFN on CUDA: output of the first matrix, activation        N 3 f gated, N 2 f squared ReLU
    FFN on a CPU, where the gate is no fused kernel            N 5 f gated, N 2 f squared ReLU
    recompute: selective leaves out the FFN, full keeps the layer's input alone

The CPU figures are held against allocations (benchmarks/plan_memory.py); those of CUDA follow from the kernels that are asked for there, and are
not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minitron_megatron.config.fp8 import ModelFp8
from minitron_megatron.plan.split import Chunk, Split

Kernels = Literal["cpu", "cuda"]
FP32 = 4
SHORT = 512
"""Tokens up to which bf16 attention on a CPU keeps its probabilities (platform/short_attention.py)."""


@dataclass(frozen=True)
class Pass:
    """How micro-batches go through a model; sequence: whole, whatever context ranks share it."""

    split: Split
    samples: int
    sequence: int
    width: int
    """Bytes of a value."""
    recompute: str = "none"
    kernels: Kernels = "cuda"
    fp8: ModelFp8 | None = None
    """Of its layers' matrix products; None for an emulation too, which computes and keeps as without."""

    @property
    def tokens(self) -> int:
        """Of this context rank."""
        return self.samples * self.sequence // self.split.context

    @property
    def state(self) -> int:
        """Bytes of a hidden state between the tensor-parallel regions."""
        return self.split.tokens(self.samples, self.sequence) * self.split.arch.hidden * self.width

    @property
    def whole_state(self) -> int:
        """Bytes of a hidden state inside of them."""
        return self.tokens * self.split.arch.hidden * self.width

    def of_neurons(self, ffn: int) -> int:
        """Bytes of one value for each token and neuron of this rank; for experts, of all that a token meets."""
        return self.tokens * ffn // self.split.tensor * max(self.split.arch.experts_per_token, 1) * self.width


def kept_by_layer(run: Pass, ffn: int) -> int:
    """Bytes that one layer keeps of a micro-batch."""
    if run.recompute == "full":
        return run.state
    kept = 2 * _norm(run) + _attention(run)
    if run.split.arch.experts:
        kept += _dispatched(run)
    return kept if run.recompute == "selective" else kept + _ffn(run, ffn)


def kept_by_chunk(run: Pass, chunk: Chunk) -> int:
    """Bytes that a chunk keeps of a micro-batch up to its last hidden states; the loss's own are in plan/loss.py."""
    arch = run.split.arch
    kept = sum(kept_by_layer(run, arch.ffn_width(layer)) for layer in chunk.layers)
    if chunk.is_first and run.split.tensor > 1:
        kept += 9 * run.tokens  # token ids of this rank's rows, and which tokens are others'
    if chunk.is_last:
        kept += run.state + _scale(run)
    else:
        kept += run.state  # megatron keeps a stage's output until its gradient comes
    return kept


def forward_beside(run: Pass, ffn: int) -> int:
    """The most that one layer holds of a micro-batch while it runs without gradients: its input, its norm's output and the larger of both halves."""
    heads, groups, arch = *_heads(run), run.split.arch
    attention = run.tokens * (4 * heads + 3 * groups) * arch.head_channels * run.width + _probabilities(run, FP32 + run.width)
    copies = (5 if run.kernels == "cpu" else 3) if arch.family.is_gated else 2
    halves = attention, copies * run.of_neurons(ffn) + (_dispatched(run) if arch.experts else 0)
    return 2 * run.state + (run.whole_state - run.state) + max(halves)


def backward_beside(run: Pass, ffn: int) -> int:
    """What the backward pass of the last layer takes on top of all that is kept: what it computes again, and gradients on their way.

    The FFN comes first: the gradient of the state and of the neurons, that of the second matrix in the weights' type before it is added to its fp32
    sum, then those of both factors of the gate.
    """
    arch, neurons = run.split.arch, run.of_neurons(ffn)
    again = {"none": 0, "selective": _ffn(run, ffn) + run.state, "full": 0}[run.recompute]
    if run.recompute == "full":
        none = Pass(run.split, run.samples, run.sequence, run.width, "none", run.kernels)
        again = kept_by_layer(none, ffn)
    matrix = ffn // run.split.tensor * arch.hidden * run.width
    gathered = run.whole_state if run.split.sequence else 0
    second = gathered + neurons + matrix
    gate = 2 * neurons
    first = run.whole_state + (2 if arch.family.is_gated else 1) * matrix - neurons
    return again + run.state + max(second, gate, first)


def _scale(run: Pass) -> int:
    """What a norm divided by, fp32; LayerNorm's mean besides, and its weight as it is used."""
    norm, tokens = run.split.arch.family.norm, run.split.tokens(run.samples, run.sequence)
    return tokens * FP32 if norm == "rmsnorm" else 2 * tokens * FP32 + run.split.arch.hidden * run.width


def _norm(run: Pass) -> int:
    """Input and output."""
    return 2 * run.state + _scale(run)


def _heads(run: Pass) -> tuple[int, int]:
    return run.split.arch.heads // run.split.tensor, run.split.arch.kv_groups // run.split.tensor


def _attention(run: Pass) -> int:
    heads, groups = _heads(run)
    arch, tokens = run.split.arch, run.tokens
    values = (heads + 2 * groups) + (2 * heads + groups)
    kept = 0
    if arch.family.qk_norm:
        values += heads if heads > groups else 0
        kept += (heads + groups) * tokens * FP32
    kept += values * arch.head_channels * tokens * run.width + _gathered(run)
    return kept + (_probabilities(run, run.width) or heads * tokens * FP32)


def _gathered(run: Pass) -> int:
    """What model/context_attention.py keeps beyond its own keys and values: those of all context ranks in their place, and two masks, which torch
    makes numbers of; Transformer Engine's ring keeps a rank's own."""
    ranks, (_, groups) = run.split.context, _heads(run)
    if ranks == 1 or run.kernels == "cuda":
        return 0
    masks = (run.sequence // (2 * ranks)) ** 2 * (2 * ranks + 1)
    of_all, own = 2 * groups * run.samples * run.sequence, 3 * groups * run.tokens
    return ((of_all - own) * run.split.arch.head_channels + masks) * run.width


def _probabilities(run: Pass, width: int) -> int:
    """Bytes of short attention on a CPU; 0 where a kernel keeps the logarithm of each row's sum in their place."""
    is_short = run.kernels == "cpu" and run.width < FP32 and run.sequence <= SHORT and run.split.context == 1
    return _heads(run)[0] * run.tokens * run.sequence * width if is_short else 0


def _ffn(run: Pass, ffn: int) -> int:
    """Behind the norm."""
    if not run.split.arch.family.is_gated:
        return 2 * run.of_neurons(ffn)
    return (5 if run.kernels == "cpu" else 3) * run.of_neurons(ffn)


def _dispatched(run: Pass) -> int:
    """Of experts: tokens sorted to them and their results, each as often as it is sent; an estimate, their loads differ."""
    arch = run.split.arch
    return 2 * run.whole_state * arch.experts_per_token + run.tokens * arch.experts * (FP32 + 2)
