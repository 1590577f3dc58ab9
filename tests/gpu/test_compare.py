"""What claims compare by, on numbers that are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from .compare import beyond, curve_distance, largest, mean_kl, other_steps
from .setting import Outcome


def test_losses_that_are_off_in_one_window_are_seen(tmp_path: Path) -> None:
    losses = [2.0 - 0.01 * step for step in range(100)]
    off = [loss * (1.03 if step >= 80 else 1.0) for step, loss in enumerate(losses)]
    assert curve_distance(20)([Outcome({"losses": off}, tmp_path), Outcome({"losses": losses}, tmp_path)]) == pytest.approx(0.03)
    with pytest.raises(ValueError, match="100 and 99 steps"):
        curve_distance(20)([Outcome({"losses": off}, tmp_path), Outcome({"losses": losses[1:]}, tmp_path)])


@pytest.mark.parametrize("change", [{"losses": [1.0, 2.0000000000000004]}, {"norms": [3.0, 5.0]}, {"weights": "b"}])
def test_a_single_bit_of_a_resumed_run_is_seen(change: dict[str, object], tmp_path: Path) -> None:
    whole = {"losses": [1.0, 2.0], "norms": [3.0, 4.0], "weights": "a", "steps": [1, 2]}
    assert other_steps([Outcome(whole, tmp_path), Outcome(whole, tmp_path)]) == 0
    assert other_steps([Outcome({**whole, **change}, tmp_path), Outcome(whole, tmp_path)]) == 1


def test_kl_is_that_of_the_reference_to_the_other(tmp_path: Path) -> None:
    """By hand: KL([1/2, 1/2] ‖ [1/4, 3/4]) = ln 2 − ln(3) / 2."""
    folders = []
    for name, p in (("other", [0.25, 0.75]), ("reference", [0.5, 0.5])):
        (tmp_path / name).mkdir()
        save_file({"logits": torch.tensor([p, p]).log() + 3}, tmp_path / name / "tensors.safetensors")
        folders.append(Outcome({}, tmp_path / name))
    assert mean_kl(folders) == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)


def test_a_unit_that_changes_sides_counts_only_away_from_the_cut() -> None:
    expected = torch.tensor([4.0, 3.0, 2.99, 1.0])
    assert beyond(torch.tensor([4.0, 2.98, 2.99, 1.0]), expected, 1e-2) == 0  # 3.00 against 2.99 of 4: a quarter of a per cent
    assert beyond(torch.tensor([4.0, 2.98, 2.99, 3.5]), expected, 1e-2) == 1  # the last, half of the largest score away


@pytest.mark.parametrize("found", [[math.nan] * 4, [4.0, 3.0, math.nan, 1.0], [math.inf, 3.0, 2.0, 1.0]])
def test_scores_that_are_no_numbers_pass_no_claim(found: list[float]) -> None:
    expected = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert beyond(torch.tensor(found), expected, 1e-2) > 0 and beyond(expected, torch.tensor(found), 1e-2) > 0
    assert math.isnan(largest([0.0, math.nan])) and math.isnan(largest([math.nan, 0.0]))
