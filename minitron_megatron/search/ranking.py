"""Which candidate is best, and which differences are noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron_megatron.search.trials import Losses, Trial

Floats = NDArray[np.float64]
NOISE_ERRORS = 2.0
"""Standard errors within which a difference is noise."""
CHOSEN, NOISE, WORSE = "chosen", "not told apart", "worse"


def estimate(values_W: Floats) -> dict[str, float]:
    """Mean over windows and its standard error; windows are of one length, so this is the mean over tokens."""
    error = float(values_W.std(ddof=1) / math.sqrt(len(values_W))) if len(values_W) > 1 else float("nan")
    return {"value": float(values_W.mean()), "stderr": error}


def paired(loss_W: Floats, reference_W: Floats) -> dict[str, Any]:
    """Difference of two models over the same windows: what windows have in common cancels, so that it is told far below the error of each."""
    found = estimate(loss_W - reference_W)
    return {**found, "noise": not abs(found["value"]) > NOISE_ERRORS * found["stderr"]}


def ranking_of(trials: Sequence[Trial], *, rank_by: str, rounds: Sequence[int]) -> dict[str, Any]:
    """Plain data for ranking.json: every trained candidate, best first, with its losses after each round and the difference to the chosen one.

    Chosen is the best of all that came through the last round, an earlier start's too whose shortlist was another.
    """
    losses = {trial.name: trial.losses() for trial in trials}
    order = sorted(losses, key=lambda name: (-max(losses[name]), losses[name][max(losses[name])][rank_by].mean()))
    chosen, by_name = order[0], {trial.name: trial for trial in trials}
    steps = sorted({step for found in losses.values() for step in found})
    finalists = [name for name in order if rounds[-1] in losses[name]]
    return {
        "rank_by": rank_by,
        "windows": len(losses[chosen][rounds[-1]][rank_by]),
        "rounds": list(rounds),
        "steps": steps,
        "chosen": chosen,
        "candidates": [_told(by_name[name], losses[name], losses[chosen], rank_by=rank_by, is_chosen=name == chosen) for name in order],
        "pairs": [
            {"candidate": b, "reference": a, "step": rounds[-1], **paired(losses[b][rounds[-1]][rank_by], losses[a][rounds[-1]][rank_by])}
            for a, b in combinations(finalists, 2)
        ],
        "order_changes": _order_changes(losses, finalists, rank_by, rounds[-1]),
    }


def _told(trial: Trial, losses: Losses, chosen: Losses, *, rank_by: str, is_chosen: bool) -> dict[str, Any]:
    step = max(losses.keys() & chosen.keys())
    difference = None if is_chosen else {"step": step, **paired(losses[step][rank_by], chosen[step][rank_by])}
    return {
        "name": trial.name,
        "architecture": trial.candidate.arch.to_dict(),
        "figures": trial.candidate.figures,
        "losses": {str(at): {name: estimate(values_W) for name, values_W in kinds.items()} for at, kinds in sorted(losses.items())},
        "windows": {str(at): {name: values_W.tolist() for name, values_W in kinds.items()} for at, kinds in sorted(losses.items())},
        "difference": difference,
        "verdict": CHOSEN if difference is None else NOISE if difference["noise"] else WORSE,
    }


def _order_changes(losses: Mapping[str, Losses], finalists: Sequence[str], rank_by: str, last: int) -> dict[str, int] | None:
    """Pairs of candidates whose order right after pruning (or as early as it is known) is another one later.

    Later is the last step that all of them came to; where they came to no other, it is the last round, and the pairs are those of the finalists.
    """
    together = set.intersection(*(set(found) for found in losses.values()))
    first, names = min(together), list(losses)
    if max(together) > first:
        last = max(together)
    else:
        names = list(finalists)
    if first == last:
        return None
    pairs = list(combinations(names, 2))
    means = {(name, step): float(losses[name][step][rank_by].mean()) for name in names for step in (first, last)}
    swapped = sum((means[a, first] - means[b, first]) * (means[a, last] - means[b, last]) < 0 for a, b in pairs)
    return {"from": first, "to": last, "pairs": len(pairs), "swapped": swapped}
