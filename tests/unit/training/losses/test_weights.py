"""Weights of losses: schedules by the step's number alone, dynamic ones by the step before, and that a continued run has both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.config.losses import WeightSchedule
from minitron_megatron.training.losses.weights import LossWeights


def schedule(**changes: Any) -> WeightSchedule:
    return WeightSchedule.model_validate({"from": 1.0, "to": 0.2, **changes})


def weights(run_steps: int = 9, **given: Any) -> LossWeights:
    return LossWeights(given, run_steps=run_steps, device="cpu")  # type: ignore[arg-type]


def sums(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (schedule(kind="linear", steps=4), [1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2]),
        # 0.6 + 0.4 cos(π k / 4)
        (schedule(steps=4), [1.0, 0.8828427, 0.6, 0.3171573, 0.2, 0.2, 0.2, 0.2, 0.2]),
        (schedule(kind="linear"), [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),  # the last of 9 steps has `to`
        (0.7, [0.7] * 9),
    ],
)
def test_a_weight_of_each_step_is_the_one_worked_out_by_hand(given: Any, expected: list[float]) -> None:
    found = weights(forward_kl=1.0, cross_entropy=given)
    assert [found.at(step)["cross_entropy"] for step in range(9)] == pytest.approx(expected, abs=1e-7)
    assert [weights(forward_kl=1.0, cross_entropy=given).at(step) for step in (8, 3)] == [found.at(8), found.at(3)]  # no memory
    assert found.moving == ([] if given == 0.7 else ["cross_entropy"])


def test_a_run_of_one_step_begins_with_from() -> None:
    assert weights(1, mse=schedule()).at(0) == {"mse": 1.0}


def test_dynamic_weights_make_every_loss_weigh_as_much_as_the_first_did() -> None:
    found = weights(reverse_kl=schedule(kind="linear", steps=2), mse="dynamic", cross_entropy="dynamic", cosine=0.0)
    assert not found.is_set
    assert found.moving == ["reverse_kl", "mse", "cross_entropy"]
    used = found.at(1)
    assert list(used) == ["reverse_kl", "mse", "cross_entropy"]  # what weighs 0 is no loss
    found.update(used, sums(reverse_kl=10.0, mse=24.0, cross_entropy=3.0))
    assert found.is_set
    now = found.at(2)
    assert [float(now[name]) for name in now] == pytest.approx([0.2, 6.0 / 24, 6.0 / 3])  # 0.6 · 10 = 6
    assert isinstance(now["mse"], Tensor) and float(used["mse"]) == 1.0  # replaced, not written into


def test_a_continued_run_has_the_weights_that_it_would_have_had() -> None:
    first, second = (weights(forward_kl=1.0, mse="dynamic", cross_entropy=schedule()) for _ in range(2))
    first.update(first.at(0), sums(forward_kl=3.0, mse=12.0))
    second.load_state_dict({**first.state_dict(), "alpha": torch.tensor(7.0), "is_set": torch.tensor(True)})  # α of hidden losses beside it
    assert second.is_set and second.at(5) == first.at(5)
    assert float(second.at(5)["mse"]) == 0.25


def test_a_checkpoint_without_weights_leaves_them_unset() -> None:
    found = weights(forward_kl=1.0, mse="dynamic")
    found.load_state_dict({})
    assert not found.is_set
