"""The token losses, the identity that injects them, and the projections' start, marks and sum over local copies."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minitron_megatron.platform import activate

activate("cpu")

from minitron_megatron.distill.hidden.loss import InjectLoss, summed_loss  # noqa: E402
from minitron_megatron.distill.hidden.projection import (  # noqa: E402
    _mark,
    initial_weight,
    sum_shared_projection_grads,
    without_projections,
)


def test_cosine_and_mse_of_states_that_are_worked_out_by_hand() -> None:
    ours = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]], [[1.0, 1.0]]])
    theirs = torch.tensor([[[6.0, 8.0]], [[0.0, 2.0]], [[1.0, 0.0]]])
    weights = torch.tensor([[1.0], [0.5], [2.0]])
    # 1 − cos: 0, 1, 1 − 1/√2; mean of squares: 25/2, 5/2, 1/2
    assert summed_loss(ours, theirs, weights, "cosine").item() == pytest.approx(0.5 + 2 * (1 - math.sqrt(0.5)), rel=1e-6)
    assert summed_loss(ours, theirs, weights, "mse").item() == pytest.approx(12.5 + 0.5 * 2.5 + 2 * 0.5, rel=1e-6)


def test_losses_of_bf16_states_are_summed_in_fp32() -> None:
    ours = torch.ones(1000, 1, 2, dtype=torch.bfloat16)
    assert summed_loss(ours, 3 * ours, torch.ones(1000, 1), "mse").item() == 4000.0  # bf16 stops counting at 256


def test_an_injected_loss_leaves_the_state_alone_and_adds_its_scaled_gradient() -> None:
    weight = torch.tensor([2.0, -1.0], requires_grad=True)
    state = weight * 3
    scale = torch.tensor(0.25)
    passed = InjectLoss.apply(state, state.square().sum(), scale)
    assert torch.equal(passed, state)
    assert passed._base is None and not passed._is_view()  # megatron refuses views
    (5 * passed).sum().backward()
    # d/dw of 5·3w + 0.25·9w²
    assert torch.equal(weight.grad, 15 + 0.25 * 18 * weight.detach())


def test_a_projection_starts_by_putting_kept_channels_into_their_places() -> None:
    weight = initial_weight("shared", 5, 3, [0, 2, 3])
    assert torch.equal(weight @ torch.tensor([7.0, 8.0, 9.0]), torch.tensor([7.0, 0.0, 8.0, 9.0, 0.0]))


def test_a_random_projection_is_the_same_in_every_process_and_keeps_the_size_of_a_state() -> None:
    torch.manual_seed(1)
    first = initial_weight("shared", 400, 300, None)
    torch.manual_seed(2)
    assert torch.equal(first, initial_weight("shared", 400, 300, None))
    assert not torch.equal(first, initial_weight("pair_1_1", 400, 300, None))
    assert first.std().item() == pytest.approx(300**-0.5, rel=0.02)  # 120 000 draws: 0.2 % at one sigma


def chunk(gradient: float, name: str = "shared") -> nn.Module:
    """As far as sum_shared_projection_grads looks: a wrapped chunk with one projection."""
    projection = nn.Linear(2, 3, bias=False)
    projection.weight.main_grad = torch.full((3, 2), gradient)
    inner = nn.Module()
    inner.distillation_projections = nn.ModuleDict({name: projection})
    return nn.ModuleDict({"module": inner})


def test_two_virtual_stages_of_one_process_get_the_sum_of_their_gradients() -> None:
    """Without a group: all copies are here."""
    chunks = [chunk(1.0), chunk(10.0), chunk(100.0, "pair_1_1")]
    sum_shared_projection_grads(chunks, None)
    gradients = [next(item.parameters()).main_grad[0, 0].item() for item in chunks]
    assert gradients == [11.0, 11.0, 100.0]


def test_what_is_published_has_every_key_but_the_projections() -> None:
    state = {"decoder.layers.0.x": 1, "distillation_projections.shared.weight": 2, "distillation_projections.pair_1_1.weight": 3}
    assert without_projections(state) == {"decoder.layers.0.x": 1}


def test_marks_of_a_projection_follow_its_copies_and_sequence_parallelism() -> None:
    def marks(**options: object) -> dict[str, object]:
        weight = SimpleNamespace()
        _mark(weight, **options)  # type: ignore[arg-type]
        return vars(weight)

    assert marks(sequence_parallel=False, copy=0, copies=1) == {}
    assert marks(sequence_parallel=True, copy=0, copies=2) == {"sequence_parallel": True, "shared_embedding": True, "shared": False}
    assert marks(sequence_parallel=False, copy=1, copies=2) == {"shared_embedding": True, "shared": True}
