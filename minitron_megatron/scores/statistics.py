"""Sufficient statistics of the importance pass (P1 section 2.2): merging, resuming and every aggregation need no new pass.

For each axis and layer, over samples: Σ a and Σ a² of each sequence aggregate a (mean |x|, L2, variance), fp64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.importance import KeptSums
from minitron_megatron.errors import ArtifactError

AGGREGATES = ("mean", "l2", "variance")
"""Order of a statistic's first dimension: what is made of a sample's tokens."""
AXES = ("heads", "head_norms", "head_contributions", "attention_norm", "mlp_norm")
"""Head outputs before the projection, by channel [H·K] · their L2 norm at each token [H] · that norm behind the head's part of the projection,
of what it adds to the layer's sum [H] · outputs of the two norms of a layer [D]."""
DEFAULT_AXES = ("heads", "attention_norm", "mlp_norm")
"""What the default ranking reads of them."""
FFN_AXES = ("ffn", "ffn_before_activation")
"""Input of the second FFN matrix · output of the first one, X·W1 (P1 section 2.2); of a gated FFN its gate's half, which the activation takes."""
EXPERT_AXES = ("experts", "expert_ffn")
"""In place of "ffn" where a layer has experts: norm of an expert's output times its router weight (as arXiv 2510.13999), and the input of its
second matrix times that weight, [E·F]; both are 0 for the tokens that are not sent to it."""
FINAL_NORM = "final_norm"
"""Output of the norm behind the last layer, kept under that layer's number."""
INFLUENCE = "influence"
"""Mean over a sample's tokens of cos(layer input, layer output); one unit."""
Key = tuple[int, str]
"""(global layer, axis)"""
MARGINS = "margins."
"""Start of the names of what is derived from the sums, for people and programs that do not rank: scores/margins.py."""


@dataclass(frozen=True)
class Statistics:
    """Key (global layer, axis) → [3 aggregates or the first, 2 (Σ a, Σ a²), units] fp64; influence, also of blocks: [2] (Σ, Σ² over samples)."""

    arch: Architecture
    samples: int
    sums: dict[Key, Tensor]
    origin: dict[str, Any] = field(default_factory=dict)
    """What was measured on what: model's digest, sequence length, precision; parts: data's digest, seed, first_sample and samples of each."""

    def save(self, path: Path, margins: Mapping[str, Tensor] | None = None, ranked_by: Mapping[str, Any] | None = None) -> None:
        """Through a temporary file, so that a reader never sees half of it. ranked_by: what the margins are of, told in the file's metadata."""
        tensors = {f"layers.{layer}.{axis}": value.contiguous() for (layer, axis), value in self.sums.items()}
        tensors |= {MARGINS + name: value.contiguous() for name, value in (margins or {}).items()}
        header = {"architecture": self.arch.to_dict(), "samples": self.samples, "origin": self.origin, "margins_ranked_by": ranked_by}
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, metadata={"statistics": json.dumps(header)})  # one entry: safetensors writes several in any order
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> Statistics:
        """Raises ArtifactError for a file that is missing, truncated or of another kind."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["statistics"])
                sums = {_key(name): file.get_tensor(name) for name in file.keys() if not name.startswith(MARGINS)}  # noqa: SIM118 - not a dict
            return Statistics(Architecture.from_dict(header["architecture"]), header["samples"], sums, header["origin"])
        except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: no whole scores file ({error}); make it anew with: minitron importance RECIPE") from None


def measured_keys(arch: Architecture, *, kept: KeptSums = "all") -> set[Key]:
    """What a pass over a model of this shape leaves."""
    if kept == "default":
        axes = (*DEFAULT_AXES, *(EXPERT_AXES if arch.experts else FFN_AXES[:1]), INFLUENCE)
        return {(layer, axis) for layer in range(arch.layers) for axis in axes}
    axes = (*AXES, *(EXPERT_AXES if arch.experts else FFN_AXES), INFLUENCE)
    return {(layer, axis) for layer in range(arch.layers) for axis in axes} | {(arch.layers - 1, FINAL_NORM)}


def influence_axis(layers: int) -> str:
    """Of blocks of so many layers, by the first of them: cos(input of the first, output of the last); one layer is a block too."""
    return INFLUENCE if layers == 1 else f"{INFLUENCE}_{layers}"


def is_influence(axis: str) -> bool:
    return axis.split("_")[0] == INFLUENCE


def _key(name: str) -> Key:
    _, layer, axis = name.split(".")
    return int(layer), axis


def over_samples(sums: Tensor, samples: int, *, sequence: str, batch: str) -> Tensor:
    """[units] fp64 score: first over tokens (already in the sums), then over samples; roots come last (P1 section 2.2).

    Raises ArtifactError where the pass kept the default aggregation's alone. batch: "mean" Σa/N, "l2" sqrt(Σa²), "variance" Σa²/N − (Σa/N)².
    """
    if len(sums) <= AGGREGATES.index(sequence):
        raise ArtifactError(f"the scores hold no sums for sequence={sequence}; make them anew with: minitron importance RECIPE importance.sums=all")
    total, squares = sums[AGGREGATES.index(sequence)]
    if batch == "mean":
        return total / samples
    if batch == "l2":
        return squares.sqrt()
    return (squares / samples - (total / samples).square()).clamp_min(0)
