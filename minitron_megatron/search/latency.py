"""Time of one request in closed form: the prompt in one pass, then token after token.

Legend: B sequences at a time, P prompt tokens, N generated tokens, C tokens in the cache, L layers, H query heads, K head channels, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from minitron_megatron.arch.architecture import Architecture, kv_cache_bytes_per_token, parameters_by_part
from minitron_megatron.config.search import BYTES_OF, LatencyBudget


@dataclass(frozen=True)
class Gpu:
    """Data-sheet numbers: dense matrix products (without sparsity) and memory bandwidth."""

    flops: dict[str, float]
    """Per second, by data type."""
    bytes_per_second: float


GPUS = {
    # NVIDIA's data sheets: H100 (2023), H200 (2024), A100 80GB (2021), L40S (2023), L4 (2023); where one gives sparse figures, half of them
    "H100_SXM": Gpu({"bf16": 989e12, "fp8": 1979e12}, 3.35e12),
    "H100_PCIe": Gpu({"bf16": 756e12, "fp8": 1513e12}, 2.0e12),
    "H200": Gpu({"bf16": 989e12, "fp8": 1979e12}, 4.8e12),
    "A100_SXM_80GB": Gpu({"bf16": 312e12}, 2.039e12),
    "L40S": Gpu({"bf16": 362e12, "fp8": 733e12}, 0.864e12),
    "L4": Gpu({"bf16": 121e12, "fp8": 242e12}, 0.3e12),
}


class LatencyModel(Protocol):
    """Architecture → seconds of the request."""

    def seconds(self, arch: Architecture) -> float: ...


class Work(NamedTuple):
    """What a pass costs: multiply-adds counted as two, bytes that are read or written."""

    flops: float
    bytes: float


class LayerWork(NamedTuple):
    """Of one layer in one pass."""

    matrix_flops: float
    attention_flops: float
    weight_bytes: float
    cache_bytes: float


@dataclass(frozen=True)
class Roofline:
    """A pass takes as long as the slower of arithmetic and memory: a lower bound that no kernel reaches, but one that ranks shapes."""

    gpu: Gpu
    request: LatencyBudget

    def seconds(self, arch: Architecture) -> float:
        request, width = self.request, BYTES_OF[self.request.precision]
        prompt = self._pass(whole(arch, prompt_layer(arch, request, width), request, width))
        step = self._pass(whole(arch, token_layer(arch, request, width), request, width)) if request.generate else 0.0
        return prompt + request.generate * step

    def _pass(self, work: Work) -> float:
        return max(work.flops / self.gpu.flops[self.request.precision], work.bytes / self.gpu.bytes_per_second)


def prompt_layer(arch: Architecture, request: LatencyBudget, bytes_per_value: float) -> LayerWork:
    """One layer over the prompt: causal attention, keys and values written."""
    tokens, reach = request.batch * request.prompt, visible(arch, request.prompt)
    # a token sees on average half of what lies before it, up to the window; scores and weighted values are two flops a product each
    seen = request.prompt / 2 if reach == request.prompt else reach * (1 - reach / (2 * request.prompt))
    return _layer(arch, tokens=tokens, seen=seen, cached=tokens, bytes_per_value=bytes_per_value)


def token_layer(arch: Architecture, request: LatencyBudget, bytes_per_value: float) -> LayerWork:
    """One layer at one generated token of each sequence, at the mean length of the cache."""
    cached = visible(arch, request.prompt + request.generate / 2)
    return _layer(arch, tokens=request.batch, seen=cached, cached=request.batch * cached, bytes_per_value=bytes_per_value)


def whole(arch: Architecture, layer: LayerWork, request: LatencyBudget, bytes_per_value: float) -> Work:
    """All layers and the output layer, which one token of each sequence needs."""
    output = arch.vocab * arch.hidden
    return Work(
        arch.layers * (layer.matrix_flops + layer.attention_flops) + 2 * request.batch * output,
        arch.layers * (layer.weight_bytes + layer.cache_bytes) + output * bytes_per_value,
    )


def visible(arch: Architecture, tokens: float) -> float:
    """Tokens that attention reaches: all, or the window."""
    return min(tokens, arch.attention_window or tokens)


def _layer(arch: Architecture, *, tokens: float, seen: float, cached: float, bytes_per_value: float) -> LayerWork:
    """tokens pass; each attends to `seen` others; keys and values of `cached` tokens are read or written.

    Of the experts each token meets some, and a pass reads at most as many as its tokens can meet.
    """
    parts = parameters_by_part(arch)
    attention, ffn, routers = (parts.get(part, 0) / arch.layers for part in ("attention", "ffn", "routers"))
    met = arch.experts_per_token / arch.experts if arch.experts else 1.0
    read = min(1.0, tokens * met)
    return LayerWork(
        matrix_flops=2 * tokens * (attention + routers + ffn * met),
        attention_flops=4 * tokens * arch.heads * arch.head_channels * seen,
        weight_bytes=(attention + routers + ffn * read) * bytes_per_value,
        cache_bytes=cached * kv_cache_bytes_per_token(arch, 1) / arch.layers * bytes_per_value,
    )
