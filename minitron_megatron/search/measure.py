"""Latency on this machine: layers of a few shapes are timed, and a linear model of their work is fitted to the times.

The timed layer is plain torch (norms, QKV, grouped-query attention with a cache, output projection, FFN) in the run's precision on the
run's device; rotary embedding and sampling are not in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture, parameters_by_part
from minitron_megatron.config.search import LatencyBudget
from minitron_megatron.platform import Platform
from minitron_megatron.search.latency import prompt_layer, token_layer, visible

Floats = NDArray[np.float64]
REPEATS, LEAST_SECONDS = 5, 0.05


@dataclass(frozen=True)
class Fit:
    """seconds ≈ coefficients · terms, none of them negative."""

    coefficients: list[float]
    residual: float
    """Root mean square of (fitted − measured) / measured."""
    left_out: float | None
    """The same where each shape is predicted from the others; None with too few shapes to tell."""

    def at(self, terms: Sequence[float]) -> float:
        return float(np.dot(self.coefficients, terms))


@dataclass(frozen=True)
class Measured:
    """Fitted times of a layer over the prompt, of a layer at one token, and of the output layer."""

    request: LatencyBudget
    prompt: Fit
    token: Fit
    output: Fit

    def seconds(self, arch: Architecture) -> float:
        output = self.output.at(output_terms(arch))
        prompt = arch.layers * self.prompt.at(prompt_terms(arch, self.request)) + output
        return prompt + self.request.generate * (arch.layers * self.token.at(token_terms(arch, self.request)) + output)

    def to_dict(self) -> dict[str, Any]:
        return {name: asdict(getattr(self, name)) for name in ("prompt", "token", "output")}

    @staticmethod
    def from_dict(fields: dict[str, Any], request: LatencyBudget) -> Measured:
        return Measured(request, **{name: Fit(**fields[name]) for name in ("prompt", "token", "output")})


def prompt_terms(arch: Architecture, request: LatencyBudget) -> list[float]:
    """A constant, matrix products, attention."""
    work = prompt_layer(arch, request, 1)
    return [1.0, work.matrix_flops, work.attention_flops]


def token_terms(arch: Architecture, request: LatencyBudget) -> list[float]:
    """A constant, weights read, cache read."""
    work = token_layer(arch, request, 1)
    return [1.0, work.weight_bytes, work.cache_bytes]


def output_terms(arch: Architecture) -> list[float]:
    return [1.0, float(arch.vocab * arch.hidden)]


def measure(shapes: Sequence[Architecture], request: LatencyBudget, platform: Platform, dtype: torch.dtype) -> Measured:
    """Times one layer of each shape and fits; the number of layers is no part of a shape."""
    seconds = [[_time(run, platform) for run in _runs(arch, request, platform, dtype)] for arch in shapes]
    prompt, token, output = (np.array(column) for column in zip(*seconds, strict=True))
    return Measured(
        request,
        fit(np.array([prompt_terms(arch, request) for arch in shapes]), prompt),
        fit(np.array([token_terms(arch, request) for arch in shapes]), token),
        fit(np.array([output_terms(arch) for arch in shapes]), output),
    )


def fit(terms_NT: Floats, seconds_N: Floats) -> Fit:
    """Least squares of relative errors with coefficients ≥ 0: a machine does not work faster for more work."""
    coefficients = _solve(terms_NT, seconds_N)
    others = [np.arange(len(seconds_N)) != row for row in range(len(seconds_N))]
    enough = len(seconds_N) > terms_NT.shape[1] + 1
    left_out = [_errors(_solve(terms_NT[rest], seconds_N[rest]), terms_NT[~rest], seconds_N[~rest])[0] for rest in others] if enough else []
    return Fit(coefficients.tolist(), _rms(_errors(coefficients, terms_NT, seconds_N)), _rms(np.array(left_out)) if enough else None)


def _solve(terms_NT: Floats, seconds_N: Floats) -> Floats:
    """Over every subset of the few terms: the best of the solutions without a negative coefficient."""
    scale_T = np.abs(terms_NT).max(0).clip(min=1e-300)
    relative_NT, best, least = terms_NT / scale_T / seconds_N[:, None], np.zeros(terms_NT.shape[1]), float("inf")
    for size in range(1, min(terms_NT.shape) + 1):
        for subset in combinations(range(terms_NT.shape[1]), size):
            solution = np.linalg.lstsq(relative_NT[:, subset], np.ones(len(seconds_N)), rcond=None)[0]
            error = float(((relative_NT[:, subset] @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < least * (1 - 1e-9):
                least, best = error, np.zeros(terms_NT.shape[1])
                best[list(subset)] = solution
    return best / scale_T


def _errors(coefficients_T: Floats, terms_NT: Floats, seconds_N: Floats) -> Floats:
    return terms_NT @ coefficients_T / seconds_N - 1


def _rms(errors: Floats) -> float:
    return float(np.sqrt((errors**2).mean()))


def _time(run: Callable[[], Any], platform: Platform) -> float:
    """Median of several runs after one that warms up; short ones are repeated within a run."""
    run()
    platform.synchronize()
    took: list[float] = []
    times = 1
    while len(took) < REPEATS:
        began = time.perf_counter()
        for _ in range(times):
            run()
        platform.synchronize()
        seconds = time.perf_counter() - began
        if seconds < LEAST_SECONDS and not took:
            times = 1 + int(times * min(10.0, LEAST_SECONDS / max(seconds, 1e-7)))
            continue
        took.append(seconds / times)
    return statistics.median(took)


def _runs(arch: Architecture, request: LatencyBudget, platform: Platform, dtype: torch.dtype) -> tuple[Callable[[], Tensor], ...]:
    """A layer over the prompt, a layer at one token with a full cache, the output layer."""
    layer = _Layer(arch, platform.device, dtype)
    prompt_BPD = layer.random(request.batch, request.prompt, arch.hidden)
    token_B1D = layer.random(request.batch, 1, arch.hidden)
    cached = int(visible(arch, request.prompt + request.generate / 2))
    cache = layer.random(2, request.batch, arch.kv_groups, cached, arch.head_channels)
    output_VD = layer.random(arch.vocab, arch.hidden)
    return lambda: layer(prompt_BPD), lambda: layer(token_B1D, cache), lambda: F.linear(token_B1D, output_VD)


class _Layer:
    """One layer's arithmetic with random weights."""

    def __init__(self, arch: Architecture, device: torch.device, dtype: torch.dtype) -> None:
        self.arch, self._device, self._dtype = arch, device, dtype
        ffn = parameters_by_part(arch)["ffn"] // arch.layers
        self._gated = ffn == 3 * arch.hidden * arch.ffn
        self.norm, self.qkv = self.random(arch.hidden), self.random(arch.qkv_rows, arch.hidden)
        self.projection = self.random(arch.hidden, arch.heads * arch.head_channels)
        self.up = self.random(arch.ffn * (2 if self._gated else 1), arch.hidden)
        self.down = self.random(arch.hidden, arch.ffn)

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, device=self._device, dtype=self._dtype) * 0.02

    @torch.no_grad()
    def __call__(self, x_BSD: Tensor, cache: Tensor | None = None) -> Tensor:
        x_BSD = x_BSD + self._attention(F.rms_norm(x_BSD, self.norm.shape, self.norm), cache)
        inner = F.linear(F.rms_norm(x_BSD, self.norm.shape, self.norm), self.up)
        if self._gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * inner
        else:
            inner = F.relu(inner).square()
        return x_BSD + F.linear(inner, self.down)

    def _attention(self, x_BSD: Tensor, cache: Tensor | None) -> Tensor:
        arch, (batch, length, _) = self.arch, x_BSD.shape
        rows = F.linear(x_BSD, self.qkv).view(batch, length, -1, arch.head_channels).transpose(1, 2)
        query, key, value = rows.split([arch.heads, arch.kv_groups, arch.kv_groups], dim=1)
        if cache is not None:  # a server writes into the cache in place; reading all of it is the cost
            key, value = cache[0], cache[1]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None, enable_gqa=True)
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), self.projection)
