"""Figures that claims are about, each from the outcomes of runs.

Legend: N tokens, V vocabulary, U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from minitron_megatron.scores.statistics import Statistics
from minitron_megatron.scores.units import UnitScores, activation_scores

from .setting import Outcome

Outcomes = list[Outcome]
Measure = Callable[[Outcomes], float]


def figure(name: str) -> Measure:
    """A figure of the only run."""
    return lambda outcomes: float(outcomes[0].figures[name])


def ratio(name: str) -> Measure:
    """Of the first run's figure to the second's."""
    return lambda outcomes: outcomes[0].figures[name] / outcomes[1].figures[name]


def share(name: str, of: str) -> Measure:
    """One figure of the only run ÷ another."""
    return lambda outcomes: outcomes[0].figures[name] / outcomes[0].figures[of]


def distance(name: str) -> Measure:
    """‖first − second‖ / ‖second‖ of a saved tensor."""
    return lambda outcomes: _distance([outcomes[0].tensors()[name]], [outcomes[1].tensors()[name]])


def figure_distance(name: str) -> Measure:
    return lambda outcomes: abs(outcomes[0].figures[name] / outcomes[1].figures[name] - 1)


def gradient_distance(outcomes: Outcomes) -> float:
    """The same of all gradients as one vector."""
    first, second = ({name: x for name, x in outcome.tensors().items() if name.startswith("gradient.")} for outcome in outcomes)
    if first.keys() != second.keys() or not first:
        raise ValueError(f"gradients of other weights: {sorted(first.keys() ^ second.keys())[:3]}")
    return _distance([first[name] for name in first], [second[name] for name in first])


def beside_local(of: Measure) -> Measure:
    """The first run's distance from the third, ÷ the second's."""
    return lambda outcomes: of([outcomes[0], outcomes[2]]) / of([outcomes[1], outcomes[2]])


def mean_kl(outcomes: Outcomes) -> float:
    """Mean over tokens of KL(second ‖ first), nats: the second is the reference."""
    other, reference = (outcome.tensors()["logits"].double().log_softmax(-1) for outcome in outcomes)
    return float(torch.nn.functional.kl_div(other, reference, reduction="none", log_target=True).sum(-1).mean())


def curve_distance(window: int) -> Measure:
    """The largest relative difference of the mean loss of `window` steps, over all windows of two trainings on the same samples."""

    def measure(outcomes: Outcomes) -> float:
        ours, theirs = (torch.tensor(outcome.figures["losses"], dtype=torch.float64) for outcome in outcomes)
        if ours.shape != theirs.shape or len(ours) < window:
            raise ValueError(f"{len(ours)} and {len(theirs)} steps, windows of {window}")
        means = [losses.unfold(0, window, window).mean(-1) for losses in (ours, theirs)]
        return float((means[0] / means[1] - 1).abs().max())

    return measure


def other_steps(outcomes: Outcomes) -> float:
    """How many losses and gradient norms differ in any bit, and 1 more where the last weights do."""
    interrupted, whole = (outcome.figures for outcome in outcomes)
    if interrupted["steps"] != whole["steps"]:
        raise ValueError(f"steps {interrupted['steps']} beside {whole['steps']}")
    pairs = [*zip(interrupted["losses"], whole["losses"], strict=True), *zip(interrupted["norms"], whole["norms"], strict=True)]
    return sum(a != b for a, b in pairs) + (interrupted["weights"] != whole["weights"])


def differing_tensors(outcomes: Outcomes) -> float:
    """Of all the checkpoints that a round trip wrote."""
    return float(sum(outcomes[0].figures.values()))


def score_distance(outcomes: Outcomes) -> float:
    """Over every axis and layer: the largest difference of a unit's score over the largest score there; NaN where one of them is."""
    first, second = map(_scores, outcomes)
    return largest(_largest_difference(a, b) for (_, a), (_, b) in zip(_axes(first), _axes(second), strict=True))


def units_beyond(tolerance: float) -> Measure:
    """Of a cut through the middle of every axis: units that one side keeps and the other does not, though their score lies further from the
    cut than twice the tolerance (each of two scores is off by that much)."""

    def measure(outcomes: Outcomes) -> float:
        first, second = map(_scores, outcomes)
        return float(sum(beyond(a, b, tolerance) for (_, a), (_, b) in zip(_axes(first), _axes(second), strict=True)))

    return measure


def beyond(found_U: Tensor, expected_U: Tensor, tolerance: float) -> int:
    """Every unit where a score is no number: those compare with nothing."""
    if not bool(found_U.isfinite().all() and expected_U.isfinite().all()):
        return len(expected_U)
    half = len(expected_U) // 2
    ours, theirs = (set(scores.argsort(descending=True, stable=True)[:half].tolist()) for scores in (found_U, expected_U))
    ranked = expected_U.sort(descending=True).values
    last_kept, first_dropped = float(ranked[half - 1]), float(ranked[half])
    largest = float(expected_U.abs().max())
    gaps = [(float(expected_U[unit]) - first_dropped if unit in theirs else last_kept - float(expected_U[unit])) / largest for unit in ours ^ theirs]
    return sum(gap > 2 * tolerance for gap in gaps)


def _axes(scores: UnitScores) -> Iterator[tuple[str, Tensor]]:
    """[U] of everything that is ranked together and has a half."""
    named = {"ffn": scores.ffn, "heads": scores.heads, "kv_groups": scores.kv_groups, "channels": [scores.channels], "layers": [scores.layers]}
    for name, rows in named.items():
        yield from ((f"{name}.{number}", row) for number, row in enumerate(rows) if len(row) > 1)


def _scores(outcome: Outcome) -> UnitScores:
    return activation_scores(Statistics.load(outcome.folder / "scores.safetensors"))


def largest(values: Iterable[float]) -> float:
    """NaN where one of them is: Python's own max passes over it unless it comes first."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def _largest_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    squared = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    return math.sqrt(squared / sum(float(b.double().square().sum()) for b in expected))
