"""Rankings: which units of one axis have the highest scores. Where two are equal, the lower index wins.

Legend: L layers, F ffn, H query heads, G key/value groups, P heads of a group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from minitron_megatron.errors import PlanError


def ranked(scores: Tensor) -> list[int]:
    """Indices from the highest score to the lowest; the sort is stable."""
    order: list[int] = torch.argsort(scores, descending=True, stable=True).tolist()
    return order


def top(scores: Tensor, count: int) -> list[int]:
    """Indices of the highest scores, ascending."""
    return sorted(ranked(scores)[:count])


def top_heads(scores_H: Tensor, groups: int, kept_per_group: int, kept_groups: Sequence[int] | None = None) -> list[int]:
    """Indices of the highest-scored heads of every kept group (None: all groups), ascending."""
    scores_GP = scores_H.view(groups, -1)
    size = scores_GP.shape[1]
    kept_groups = range(groups) if kept_groups is None else kept_groups
    return [group * size + head for group in kept_groups for head in top(scores_GP[group], kept_per_group)]


def residual_partners(scores_H: Tensor, groups: int, kept_per_group: int, kept_groups: Sequence[int]) -> dict[int, int]:
    """Kept head → the pruned head of its group whose residual it takes (P1 section 2.3).

    Of P heads of a group, sorted by importance, K are kept; head i in [2K − P, K) (0-based) becomes head_i + (head_i − head_{2K−1−i}): the
    least important kept one has the most important pruned one as partner. Raises PlanError for K < P/2, where partners are not enough.
    """
    scores_GP = scores_H.view(groups, -1)
    size = scores_GP.shape[1]
    if 2 * kept_per_group < size:
        raise PlanError(f"prune.head_residual: {kept_per_group} of a group's {size} heads are kept; keep at least half, or set it to false")
    partners: dict[int, int] = {}
    for group in kept_groups:
        order = [group * size + head for head in ranked(scores_GP[group])]
        partners |= {order[i]: order[2 * kept_per_group - 1 - i] for i in range(2 * kept_per_group - size, kept_per_group)}
    return partners


def widths_of_budget(scores: Sequence[Tensor], neurons: int, multiple: int) -> list[int]:
    """The width of each layer where neurons of all layers are ranked together, `neurons` in all, each width a multiple of `multiple`.

    scores: L × [F]. A neuron counts by its share of its layer's mean score, because activations grow with depth; neurons go in blocks of
    `multiple`, best first, every layer keeps one block at least. P1 (section 2.3) ranks within a layer only.
    Raises PlanError where the layers do not hold so many blocks.
    """
    blocks = [_blocks(layer_scores, multiple) for layer_scores in scores]
    wanted, held = neurons // multiple, sum(map(len, blocks))
    if not len(scores) <= wanted <= held:
        raise PlanError(f"prune.ffn_by=global: {neurons} neurons in blocks of {multiple} do not fit {len(scores)} layers that hold {held} blocks")
    chosen = Counter(layer for _, _, layer in _in_order(blocks)[:wanted])
    return [chosen[layer] * multiple for layer in range(len(scores))]


def budget_margin(scores: Sequence[Tensor], neurons: int, multiple: int) -> float | None:
    """The gap between the last block that such a budget keeps and the first that goes, over the best block's score, unitless.

    None where no block is kept or goes by its score: each layer keeps one, or all of them.
    """
    blocks, wanted = [_blocks(layer_scores, multiple) for layer_scores in scores], neurons // multiple
    order = _in_order(blocks)
    if wanted in (len(scores), len(order)):
        return None
    (_, last, _), (_, first, _) = order[wanted - 1 : wanted + 1]
    return (first - last) / max(max(of_layer) for of_layer in blocks)


def _in_order(blocks: list[list[float]]) -> list[tuple[bool, float, int]]:
    """(not its layer's first, −score, layer), best first: every layer's first block ahead of all others.

    Within a layer blocks only get worse, so each keeps its first ones.
    """
    return sorted((number > 0, -score, layer) for layer, of_layer in enumerate(blocks) for number, score in enumerate(of_layer))


def _blocks(scores_F: Tensor, multiple: int) -> list[float]:
    """Mean score of each whole block of a layer, best first, over the layer's mean."""
    best_first = scores_F[ranked(scores_F)].double()
    whole = len(best_first) // multiple * multiple
    mean = best_first.mean().clamp_min(1e-300)  # all zero: every block is a tie
    means: list[float] = (best_first[:whole].view(-1, multiple).mean(-1) / mean).tolist()
    return means
