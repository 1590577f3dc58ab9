"""Losses against what is stored of a teacher, on one rank, against whole distributions in fp64. Several ranks: tests/distributed/test_stored.py.

Legend: N tokens, V vocabulary, D hidden, K classes, R draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minitron_megatron.distill.stored import _target
from minitron_megatron.stored.records import OutputFormat, SampleRecord, TopKRecord
from minitron_megatron.teacher_logits.outputs import counted, drawn_tokens
from minitron_megatron.training.kd_loss import fused_distillation_loss
from minitron_megatron.training.losses.settings import LossSettings
from minitron_megatron.training.losses.stored import StoredSample, StoredTopK
from minitron_megatron.training.losses.target import TokenLabels

N, V, D = 6, 37, 12


@pytest.fixture
def given() -> tuple[Tensor, Tensor, TokenLabels, Tensor]:
    """Student's hidden states and weight, labels with weights, the teacher's log-probabilities in fp64."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator) * 0.4
    labels = TokenLabels(torch.randint(V, (N,), generator=generator), torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 1.0]))
    return hidden, weight, labels, (2 * torch.randn(N, V, generator=generator).double()).log_softmax(-1)


def fused(given: Any, target: Any, settings: LossSettings, group: Any) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    hidden, weight = given[0].clone().requires_grad_(), given[1].clone().requires_grad_()
    total, sums = fused_distillation_loss(hidden, weight, given[2], [target], settings, rows=V, group=group)
    total.backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach(), sums, hidden.grad, weight.grad


def full_kl(given: Any, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = given[0].double().requires_grad_(), given[1].double().requires_grad_()
    log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
    total = temperature**2 * (given[2].token_weights_N * (given[3].exp() * (given[3] - log_p)).sum(-1)).sum()
    total.backward()
    assert hidden.grad is not None and weight.grad is not None
    return total.detach(), hidden.grad, weight.grad


def test_the_mean_gradient_over_samples_is_that_of_the_whole_distribution(given: Any, layout: Any) -> None:
    """400 stored samples of 50 draws: each mean lies within 5 of its own standard errors, and the errors are small beside the gradient."""
    settings, places = LossSettings(temperature=2.0, chunk_tokens=4, stored="sample"), np.random.default_rng(4)
    entropy = -(given[3].exp() * given[3]).sum(-1)
    found: list[Tensor] = []
    for _ in range(400):
        ids, counts = counted(drawn_tokens(given[3], torch.from_numpy(places.random((N, 50)))))
        total, _, grad_hidden, grad_weight = fused(given, StoredSample(ids, counts / 50, entropy.float()), settings, layout.groups.tp)
        found.append(torch.cat([total[None], grad_hidden.flatten(), grad_weight.flatten()]).double())
    samples = torch.stack(found)
    total, *gradients = full_kl(given, 2.0)
    expected = torch.cat([total[None], *(gradient.flatten() for gradient in gradients)])
    error = samples.std(0) / 20
    # over 500 numbers: five standard errors are exceeded by chance once in some thousand runs; 1e-5 for fp32
    assert bool(((samples.mean(0) - expected).abs() <= 5 * error + 1e-5 * expected.abs().max()).all())
    assert float(error[1:].norm() / expected[1:].norm()) < 0.05
    assert float(error[0] / expected[0]) < 0.02


def test_every_token_is_drawn_as_often_as_it_is_likely(given: Any) -> None:
    """Also one that has no probability: never."""
    log_q = given[3][:1].clone()
    log_q[0, 5] = -torch.inf
    log_q = log_q.log_softmax(-1)
    ids, counts = counted(drawn_tokens(log_q, torch.from_numpy(np.random.default_rng(5).random((1, 50_000)))))
    shares = torch.zeros(V, dtype=torch.float64)
    shares[ids[0].long()] = counts[0].double() / 50_000
    q = log_q[0].exp()
    assert shares[5] == 0 and int(counts.sum()) == 50_000
    assert bool(((shares - q).abs() <= 5 * (q * (1 - q) / 50_000).sqrt()).all())  # binomial


def test_counting_keeps_every_draw() -> None:
    ids, counts = counted(torch.tensor([[3, 3, 3, 3], [9, 1, 9, 0], [2, 4, 8, 6]]))
    assert ids.tolist() == [[3, 0, 0, 0], [0, 1, 9, 0], [2, 4, 6, 8]]
    assert counts.tolist() == [[4, 0, 0, 0], [1, 1, 2, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 0.7)])
def test_all_tokens_but_one_in_fp32_are_the_whole_distribution(given: Any, layout: Any, temperature: float, weight: float) -> None:
    top, ids = given[3].sort(-1, descending=True)
    target = StoredTopK(ids[:, :-1].int(), top[:, :-1].float(), top[:, -1].float(), weight)
    total, sums, *gradients = fused(given, target, LossSettings(temperature=temperature, chunk_tokens=4, stored="top_k"), layout.groups.tp)
    expected, *expected_gradients = full_kl(given, temperature)
    torch.testing.assert_close(total.double(), weight * expected, rtol=2e-6, atol=1e-6)  # fp32 sums
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), weight * wanted, rtol=1e-5, atol=2e-6)
    assert sums.keys() == {"cross_entropy", "forward_kl_top_k"}


def test_rounded_classes_sum_to_one_and_keep_a_small_tail(given: Any) -> None:
    """A tail of 1e-6 beside fp16's rounding of 1e-4: taken as what is missing to 1 it would be lost."""
    log_q = torch.tensor([[0.55, 0.45 - 1e-6, 1e-6]], dtype=torch.float64).log()
    target = StoredTopK(torch.tensor([[4, 7]]).int(), log_q[:, :2].half(), log_q[:, 2].half()).classes()
    classes = torch.cat([target.log_probs_nK, target.log_tail_n[:, None]], dim=-1).double()
    assert abs(float(classes.exp().sum()) - 1) <= 1e-6  # fp32
    # each rounding is at most 2^-11 of the logarithm; making the sum 1 adds at most their mean
    assert bool(((classes - log_q).abs() <= 2**-11 * (log_q.abs() - (log_q.exp() * log_q).sum())).all())


def test_micro_batches_are_in_the_order_of_hidden_states() -> None:
    """[S, B]: the first place of every sample, then the second."""
    form = OutputFormat("top_k", 2, 50, 3, 1.0, "float32", 4)
    records = [TopKRecord(torch.full((3, 2), sample), torch.zeros(3, 2), torch.arange(3.0) + 10 * sample) for sample in (1, 2)]
    target = _target(records, form, 0.5, torch.device("cpu"))
    assert isinstance(target, StoredTopK) and target.weight == 0.5
    assert target.log_tail_N.tolist() == [10, 20, 11, 21, 12, 22] and target.ids_NK[:, 0].tolist() == [1, 2, 1, 2, 1, 2]
    narrow, wide = (
        SampleRecord(torch.full((3, width), 7), torch.full((3, width), 8 // width, dtype=torch.int32), torch.zeros(3)) for width in (1, 2)
    )
    drawn = _target([narrow, wide], OutputFormat("sample", 8, 50, 3, 1.0, "float16", 4), 1.0, torch.device("cpu"))
    assert isinstance(drawn, StoredSample) and drawn.shares_NU.tolist() == [[1, 0], [0.5, 0.5]] * 3
