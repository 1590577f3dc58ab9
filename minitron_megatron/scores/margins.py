"""How clear a cut is: the gap between the last unit that is kept and the first that goes.

Legend: L layers, D hidden, F ffn, E experts, G key/value groups, P heads of a group. A score is known to a tolerance (another layout adds in
another order), so a kept set is the same under every layout where the margin at its cut is above twice that tolerance.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitron_megatron.config.criteria import DEFAULT_RANKING
from minitron_megatron.errors import ArtifactError
from minitron_megatron.scores.statistics import MARGINS, Statistics
from minitron_megatron.scores.units import UnitScores, activation_scores


def cut_margins(scores_xU: Tensor) -> Tensor:
    """[…, U − 1] relative gap at every possible cut: entry k − 1 is (k-th best − (k+1)-th best) / the largest score of all.

    scores_xU: units on the last dimension, ranked there; the largest score is of the whole tensor. Unitless, ≥ 0.
    """
    ranked = scores_xU.sort(dim=-1, descending=True).values
    largest = scores_xU.abs().max().clamp_min(1e-300)  # all zero: every cut is a tie
    return (ranked[..., :-1] - ranked[..., 1:]) / largest


def unit_margins(scores: UnitScores, kv_groups: int) -> dict[str, Tensor]:
    """ffn.LAYER [F − 1], heads.LAYER [G, P − 1] (heads are ranked within their group), kv_groups.LAYER [G − 1], channels [D − 1], layers [L − 1].

    Where layers have experts, experts.LAYER [E − 1] and expert_ffn.LAYER [E, F − 1] in place of ffn.
    """
    ffn = {f"ffn.{layer}": cut_margins(values) for layer, values in enumerate(scores.ffn)}
    heads = {f"heads.{layer}": cut_margins(values.view(kv_groups, -1)) for layer, values in enumerate(scores.heads)}
    groups = {f"kv_groups.{layer}": cut_margins(values) for layer, values in enumerate(scores.kv_groups)}
    experts = {f"experts.{layer}": cut_margins(values) for layer, values in enumerate(scores.experts)}
    neurons = {f"expert_ffn.{layer}": cut_margins(values_EF) for layer, values_EF in enumerate(scores.expert_ffn)}
    return {**ffn, **experts, **neurons, **heads, **groups, "channels": cut_margins(scores.channels), "layers": cut_margins(scores.layers)}


def margin_at(scores_xU: Tensor, kept: int) -> float | None:
    """The relative gap at one cut, the smallest over groups; None where nothing is cut."""
    return float(cut_margins(scores_xU)[..., kept - 1].min()) if kept < scores_xU.shape[-1] else None


def save_scores(statistics: Statistics, path: Path) -> UnitScores:
    """Writes the scores file, with the margins of the default criteria and aggregation (P1 Table 11) at every cut; returns its scores."""
    scores = activation_scores(statistics)
    ranked_by = DEFAULT_RANKING.to_dict(sparse=statistics.arch.experts > 0)
    statistics.save(path, unit_margins(scores, statistics.arch.kv_groups), ranked_by)
    return scores


def load_margins(path: Path) -> dict[str, Tensor]:
    """The margins of a scores file, by the names of unit_margins; raises ArtifactError for a file that is missing or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(MARGINS)]  # noqa: SIM118 - not a dict
            return {name.removeprefix(MARGINS): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: no whole scores file ({error}); make it anew with: minitron importance RECIPE") from None
