"""Losses of held-out windows, and of all of them."""

from __future__ import annotations

import pytest
import torch

from minitron_megatron.training.sums import WindowSums


def test_a_window_without_tokens_has_no_mean_and_adds_nothing() -> None:
    values_WN = torch.tensor([[6.0, 3.0, 3.0], [0.0, 0.0, 0.0], [8.0, 1.0, 4.0]], dtype=torch.float64)
    found = WindowSums(("cross_entropy", "forward_kl", "tokens"), values_WN)
    assert found.means() == {"cross_entropy": [2.0, None, 2.0], "forward_kl": [1.0, None, 0.25]}
    assert found.total().means() == pytest.approx({"cross_entropy": 2.0, "forward_kl": 4 / 7}, rel=1e-15)
