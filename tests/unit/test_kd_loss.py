"""The fused distillation loss on one rank against plain torch: F.kl_div, F.cross_entropy and autograd over whole logits.

Legend: N tokens, V vocabulary rows (real and padded), D student's hidden, E teacher's hidden. Several ranks are in tests/distributed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minitron_megatron.training.kd_loss import GradientBuffer, fused_distillation_loss
from minitron_megatron.training.losses.settings import LossSettings
from minitron_megatron.training.losses.target import TokenLabels, WeightedTarget

N, ROWS, PADDED, D, E = 23, 131, 136, 16, 24
LOSSES = {"kl": {"forward_kl": 1.0}, "ce": {"cross_entropy": 1.0}, "both": {"forward_kl": 0.7, "cross_entropy": 0.4}}


@dataclass
class Case:
    """One micro-batch: leaves of autograd, and what the student is held against."""

    hidden: Tensor
    weight: Tensor
    labels: TokenLabels
    target: WeightedTarget
    settings: LossSettings
    group: Any

    def loss(self, buffer: GradientBuffer | None = None) -> tuple[Tensor, Tensor, Tensor]:
        targets = [self.target]
        total, sums = fused_distillation_loss(
            self.hidden, self.weight, self.labels, targets, self.settings, rows=ROWS, group=self.group, buffer=buffer
        )
        return total, sums["forward_kl"], sums["cross_entropy"]

    def plain(self) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, KL, cross-entropy) from whole logits in fp32, the padded rows left out; differentiable."""
        student = self.hidden.float() @ self.weight[:ROWS].float().t()
        teacher = self.target.hidden_NE.float() @ self.target.weight_vE[:ROWS].float().t()
        t, weights = self.settings.temperature, self.labels.token_weights_N
        divergence = F.kl_div((student / t).log_softmax(-1), (teacher / t).log_softmax(-1), reduction="none", log_target=True).sum(-1)
        kl = t * t * (divergence * weights).sum()
        cross_entropy = (F.cross_entropy(student, self.labels.labels_N, reduction="none") * weights).sum()
        return self.settings.total({"forward_kl": kl, "cross_entropy": cross_entropy}), kl, cross_entropy

    def plain_gradients(self) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(self.plain()[0], (self.hidden, self.weight))


@pytest.fixture
def case(layout: Any) -> Case:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    token_weights = torch.rand(N, generator=generator)
    token_weights[[0, 7, 22]] = 0  # padding, the first and the last token among it
    labels = torch.randint(ROWS, (N,), generator=generator)
    labels[:2] = torch.tensor([0, ROWS - 1])
    return Case(
        hidden=draw(N, D).requires_grad_(),
        weight=draw(PADDED, D).mul_(0.5).requires_grad_(),
        labels=TokenLabels(labels, token_weights),
        target=WeightedTarget(draw(N, E), draw(PADDED, E) * 0.5),
        settings=LossSettings(chunk_tokens=5),  # 23 = 4 × 5 + 3
        group=layout.groups.tp,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("losses", LOSSES)
def test_value_and_gradients_are_those_of_plain_torch(losses: str, temperature: float, case: Case) -> None:
    case.settings = replace(case.settings, weights=LOSSES[losses], temperature=temperature)
    total, kl, cross_entropy = case.loss()
    for actual, expected in zip((total, kl, cross_entropy), case.plain(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-5)  # fp32 sums of 131 × 23 terms, other order
    expected_hidden, expected_weight = case.plain_gradients()
    total.backward()
    assert case.hidden.grad is not None and case.weight.grad is not None
    torch.testing.assert_close(case.hidden.grad, expected_hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(case.weight.grad, expected_weight, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    """A second reference that shares no formula: the loss itself, a step to each side in fp64 of the plain one."""
    case.settings = replace(case.settings, weights=LOSSES["both"], temperature=2.0)
    direction = torch.randn(N, D, generator=torch.Generator().manual_seed(3))
    case.loss()[0].backward()
    assert case.hidden.grad is not None
    slope = (case.hidden.grad * direction).sum()
    step, middle, losses = 1e-2, case.hidden.detach().clone(), []
    for sign in (1, -1):
        with torch.no_grad():
            case.hidden = middle + sign * step * direction
            losses.append(case.loss()[0].double())
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), slope.double(), rtol=2e-3, atol=0)  # third derivatives remain


@pytest.mark.parametrize("chunk_tokens", [1, 4, 22, 23, 24, 1000])
def test_the_size_of_a_chunk_changes_nothing(chunk_tokens: int, case: Case) -> None:
    case.settings = replace(case.settings, weights=LOSSES["both"], chunk_tokens=chunk_tokens)
    total, expected = case.loss()[0], case.plain()[0]
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-5)
    gradients = torch.autograd.grad(total, (case.hidden, case.weight))
    for actual, plain in zip(gradients, case.plain_gradients(), strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-5, atol=1e-6)


def test_tokens_of_weight_zero_change_neither_loss_nor_gradients(case: Case) -> None:
    case.settings = replace(case.settings, weights=LOSSES["both"])
    silent = case.labels.token_weights_N == 0
    total = case.loss()[0]
    hidden_grad, weight_grad = torch.autograd.grad(total, (case.hidden, case.weight))
    assert silent.sum() == 3
    assert hidden_grad[silent].abs().max() == 0
    with torch.no_grad():
        case.hidden[silent] = 5.0
        case.target.hidden_NE[silent] = -3.0
    again = case.loss()[0]
    assert torch.equal(again, total)  # to the bit: they are multiplied by zero
    assert torch.equal(torch.autograd.grad(again, case.weight)[0], weight_grad)


def test_padded_rows_are_invisible_and_get_no_gradient(case: Case) -> None:
    total = case.loss()[0]
    with torch.no_grad():
        case.weight[ROWS:] = 1000.0
        case.target.weight_vE[ROWS:] = -1000.0
    again = case.loss()[0]
    assert torch.equal(again, total)
    assert torch.autograd.grad(again, case.weight)[0][ROWS:].abs().max() == 0


def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient(case: Case) -> None:
    case.hidden = case.target.hidden_NE.clone().requires_grad_()
    case.weight = case.target.weight_vE.clone().requires_grad_()
    total, kl, _ = case.loss()
    assert kl.abs() < 1e-4  # 23 tokens, each exact to a rounding of its log-normaliser of about 5
    hidden_grad, weight_grad = torch.autograd.grad(total, (case.hidden, case.weight))
    assert max(hidden_grad.abs().max(), weight_grad.abs().max()) < 1e-5


def test_large_logits_do_not_overflow(case: Case) -> None:
    """Logits of several hundred: exp() of them is infinite, and the teacher is certain."""
    with torch.no_grad():
        case.hidden *= 60
        case.target.hidden_NE.mul_(60)
    case.settings = replace(case.settings, weights=LOSSES["both"])
    total, expected = case.loss()[0], case.plain()[0]
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)  # values of several thousand
    for gradient in torch.autograd.grad(total, (case.hidden, case.weight)):
        assert torch.isfinite(gradient).all()


def test_bf16_is_within_a_hundredth_of_fp32(case: Case) -> None:
    """The same bf16 inputs; the reference multiplies them in fp32."""
    case.settings = replace(case.settings, weights=LOSSES["both"])
    case.hidden = case.hidden.detach().bfloat16().requires_grad_()
    case.weight = case.weight.detach().bfloat16().requires_grad_()
    case.target = replace(case.target, hidden_NE=case.target.hidden_NE.bfloat16(), weight_vE=case.target.weight_vE.bfloat16())
    total, expected = case.loss()[0], case.plain()[0]
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=1e-2, atol=0)  # bf16 logits have 8 bits
    for actual, plain in zip(torch.autograd.grad(total, (case.hidden, case.weight)), case.plain_gradients(), strict=True):
        assert actual.dtype == torch.bfloat16
        error = (actual.float() - plain.float()).norm() / plain.float().norm()
        assert error < 1e-2


def test_backward_scales_with_the_gradient_that_comes_in(case: Case) -> None:
    """The schedule multiplies by 1 / tokens and by the loss scale after forward."""
    expected = case.plain_gradients()
    total = case.loss()[0]
    (total * 0.125 / 3).backward()
    assert case.hidden.grad is not None and case.weight.grad is not None
    torch.testing.assert_close(case.hidden.grad, expected[0] * 0.125 / 3, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(case.weight.grad, expected[1] * 0.125 / 3, rtol=1e-5, atol=1e-7)


def test_the_loss_may_be_divided_in_place_without_touching_what_is_logged(case: Case) -> None:
    total, kl, cross_entropy = case.loss()
    before = (kl.clone(), cross_entropy.clone())
    total /= 7  # megatron's schedule does this
    assert torch.equal(kl, before[0]) and torch.equal(cross_entropy, before[1])
    assert len({tensor.untyped_storage().data_ptr() for tensor in (total, kl, cross_entropy)}) == 3
    assert not kl.requires_grad and not cross_entropy.requires_grad
    total.backward()


def test_gradients_are_summed_over_micro_batches(case: Case) -> None:
    expected, buffer = case.plain_gradients(), GradientBuffer()
    for _ in range(3):
        case.loss(buffer)[0].backward()
    assert case.hidden.grad is not None and case.weight.grad is not None
    torch.testing.assert_close(case.hidden.grad, 3 * expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(case.weight.grad, 3 * expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("order", "main_grad"), product(("first-in-first-out", "last-in-first-out"), (False, True)))
def test_two_micro_batches_in_flight_do_not_share_a_buffer(order: str, main_grad: bool, case: Case) -> None:
    """A pipeline runs several forwards before their backwards."""
    expected, buffer = case.plain_gradients()[1], GradientBuffer()
    if main_grad:
        case.weight.main_grad = torch.zeros(PADDED, D)  # type: ignore[attr-defined]
    other = replace_hidden(case, 2.0)
    also_expected = torch.autograd.grad(other.plain()[0], other.weight)[0]
    losses = [case.loss(buffer)[0], other.loss(buffer)[0]]
    for loss in losses if order == "first-in-first-out" else losses[::-1]:
        loss.backward()
    summed = case.weight.main_grad if main_grad else case.weight.grad  # type: ignore[attr-defined]
    torch.testing.assert_close(summed, expected + also_expected, rtol=1e-5, atol=1e-6)


def replace_hidden(case: Case, factor: float) -> Case:
    return replace(case, hidden=(case.hidden.detach() * factor).requires_grad_())


def test_the_buffer_is_used_again_by_the_next_micro_batch(case: Case) -> None:
    buffer = GradientBuffer()
    addresses = []
    for _ in range(3):
        taken = buffer.take(case.weight)
        addresses.append(taken.data_ptr())
        assert taken.abs().max() == 0 and taken.dtype == torch.float32
        taken.fill_(3)
        buffer.give_back(taken)
    assert len(set(addresses)) == 1
    first, second = buffer.take(case.weight), buffer.take(case.weight)
    assert first.data_ptr() != second.data_ptr()
    buffer.give_back(second)  # the extra one: the buffer is still out
    assert buffer.take(case.weight).data_ptr() not in (first.data_ptr(), second.data_ptr())


@pytest.mark.parametrize("zero_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_main_grad_the_gradient_lands_there(dtype: torch.dtype, zero_out: bool, case: Case) -> None:
    """What megatron's DDP makes of a parameter: an fp32 buffer that backward adds to, and a flag for its hook."""
    expected = case.plain_gradients()[1] / 4
    case.hidden = case.hidden.detach().to(dtype).requires_grad_()
    case.weight = case.weight.detach().to(dtype).requires_grad_()
    case.target = replace(case.target, hidden_NE=case.target.hidden_NE.to(dtype), weight_vE=case.target.weight_vE.to(dtype))
    case.weight.main_grad = torch.ones(PADDED, D)  # type: ignore[attr-defined]
    case.weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    case.weight.zero_out_wgrad = zero_out  # type: ignore[attr-defined]
    fired: list[Tensor | None] = []
    case.weight.register_post_accumulate_grad_hook(lambda weight: fired.append(weight.grad))
    total = case.loss()[0]
    assert torch.equal(case.weight.main_grad, torch.ones(PADDED, D))  # type: ignore[attr-defined] - forward delivers nothing
    assert not case.weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    (total / 4).backward()
    added = case.weight.main_grad - 1  # type: ignore[attr-defined]
    assert (added - expected).norm() / expected.norm() < (1e-5 if dtype == torch.float32 else 1e-2)
    assert case.weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    (dummy,) = fired  # overlap_grad_reduce waits for this hook, so that the dummy must not be None
    assert dummy is not None and dummy.shape == case.weight.shape and dummy.dtype == dtype
    if zero_out:
        assert dummy.abs().max() == 0


def test_nothing_is_kept_under_no_grad(case: Case) -> None:
    """Validation must not pay for a [V, D] gradient, nor take the buffer and never give it back."""
    buffer = GradientBuffer()
    expected = case.plain()[0].detach()
    with torch.no_grad():
        total = case.loss(buffer)[0]
    assert not total.requires_grad
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-5)
    assert buffer._buffer is None and not buffer._taken


def test_a_frozen_weight_still_lets_the_hidden_states_learn(case: Case) -> None:
    expected = case.plain_gradients()[0]
    case.weight = case.weight.detach()
    case.loss()[0].backward()
    assert case.hidden.grad is not None and case.weight.grad is None
    torch.testing.assert_close(case.hidden.grad, expected, rtol=1e-5, atol=1e-6)


def test_a_micro_batch_without_tokens_has_loss_zero(case: Case) -> None:
    case.hidden = torch.zeros(0, D, requires_grad=True)
    case.target = WeightedTarget(torch.zeros(0, E), case.target.weight_vE)
    case.labels = TokenLabels(torch.zeros(0, dtype=torch.long), torch.zeros(0))
    total = case.loss()[0]
    total.backward()
    assert total.item() == 0 and case.weight.grad is not None and case.weight.grad.abs().max() == 0
