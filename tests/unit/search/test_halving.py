"""Who goes on, who is trained to which step, and what is dropped."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from minitron_megatron.config.search import ShortDistillation
from minitron_megatron.search.halving import successive_halving

# c is best after pruning, and falls behind; a is late
LOSS = {"a": {0: 9.0, 10: 5.0, 30: 1.0}, "b": {0: 8.0, 10: 4.0, 30: 2.0}, "c": {0: 1.0, 10: 6.0, 30: 6.0}, "d": {0: 7.0, 10: 7.0, 30: 0.0}}


def run(rounds: list[int], keep: float) -> tuple[list[str], list[tuple[list[str], int]], list[str]]:
    """(best first, who was trained to which step, who was dropped)"""
    trained: list[tuple[list[str], int]] = []
    dropped: list[str] = []
    best = successive_halving(
        list(LOSS),
        rounds=rounds,
        keep=keep,
        train=lambda names, step: trained.append((sorted(names), step)),
        loss=lambda name, step: LOSS[name][step],
        drop=dropped.append,
    )
    return best, trained, dropped


def test_each_round_keeps_the_better_half_by_the_loss_at_its_end() -> None:
    best, trained, dropped = run([10, 30], 0.5)
    assert best == ["a", "b"]  # d, the best in the end, was not seen that far
    assert trained == [(["a", "b", "c", "d"], 10), (["a", "b"], 30)]
    assert dropped == ["c", "d"]


@pytest.mark.parametrize(("keep", "sizes"), [(1.0, [4, 4, 4]), (0.75, [4, 3, 3]), (0.5, [4, 2, 1]), (0.3, [4, 2, 1]), (0.01, [4, 1, 1])])
def test_the_share_that_goes_on_is_rounded_up(keep: float, sizes: list[int]) -> None:
    assert [len(names) for names, _ in run([0, 10, 30], keep)[1]] == sizes


def test_one_round_drops_nobody() -> None:
    assert run([30], 0.5) == (["d", "a", "b", "c"], [(["a", "b", "c", "d"], 30)], [])


@pytest.mark.parametrize("rounds", [[], [0], [10, 5], [5, 5], [-1, 5]])
def test_rounds_ascend_and_train(rounds: list[int]) -> None:
    with pytest.raises(ValidationError):
        ShortDistillation(rounds=rounds)
