"""α: P1's ratio of the losses, what keeps it from going astray, and that a continued run has it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minitron_megatron.training.balance import LossBalance


def value(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


def test_dynamic_alpha_makes_the_hidden_losses_weigh_as_much_as_the_logits_loss() -> None:
    balance = LossBalance("dynamic", "cpu")
    assert not balance.is_set
    balance.update(value(6.0), value(24.0))
    assert balance.is_set and balance.alpha.item() == 0.25 and balance.alpha.dtype == torch.float32
    balance.update(value(6.0), value(2.0))
    assert balance.alpha.item() == 3.0


@pytest.mark.parametrize("logit", [0.0, 1.0, math.inf, math.nan])
@pytest.mark.parametrize("hidden", [0.0, math.inf, math.nan])
def test_losses_without_a_ratio_leave_alpha_as_it_was(logit: float, hidden: float) -> None:
    balance = LossBalance("dynamic", "cpu")
    balance.update(value(1.0), value(4.0))
    balance.update(value(logit), value(hidden))
    assert balance.alpha.item() == 0.25


def test_an_update_never_writes_into_the_alpha_that_a_backward_pass_holds() -> None:
    balance = LossBalance("dynamic", "cpu")
    held = balance.alpha
    balance.update(value(1.0), value(4.0))
    assert held.item() == 1.0


def test_alpha_is_computed_without_asking_the_device() -> None:
    """On the meta device every read by the host raises."""
    balance = LossBalance("dynamic", "meta")
    balance.update(torch.zeros((), device="meta"), torch.zeros((), device="meta"))
    assert balance.alpha.is_meta


def test_a_given_weight_stays_whatever_the_losses_and_the_checkpoint_say() -> None:
    balance = LossBalance(0.5, "cpu")
    assert balance.is_set
    balance.update(value(1.0), value(4.0))
    balance.load_state_dict({"alpha": torch.tensor(7.0), "is_set": torch.tensor(True)})
    assert balance.alpha.item() == 0.5


def test_a_continued_run_starts_with_the_saved_alpha() -> None:
    before, after = LossBalance("dynamic", "cpu"), LossBalance("dynamic", "cpu")
    before.update(value(1.0), value(3.0))
    state = before.state_dict()
    before.update(value(1.0), value(5.0))
    after.load_state_dict(state)
    assert after.is_set and torch.equal(after.alpha, torch.tensor(1 / 3))
    after.load_state_dict(LossBalance("dynamic", "cpu").state_dict())
    assert not after.is_set
