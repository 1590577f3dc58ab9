"""Every loss of the output layer on one rank against whole logits in fp64. Several ranks: tests/distributed/test_losses.py.

Legend: N tokens, V vocabulary rows (real and padded), D student's hidden, E teacher's hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from plain_losses import cross_entropy, token_losses
from torch import Tensor

from minitron_megatron.model.divergence import Softmax, shard_sums
from minitron_megatron.training.kd_loss import fused_distillation_loss
from minitron_megatron.training.losses import chunk, in_place, terms, top_k
from minitron_megatron.training.losses.settings import LossSettings
from minitron_megatron.training.losses.target import TokenLabels, WeightedTarget
from minitron_megatron.training.losses.terms import Shard

N, ROWS, PADDED, D, E = 23, 131, 136, 16, 24
ALONE = [{name: 1.0} for name in ("forward_kl", "reverse_kl", "jensen_shannon", "mse", "cosine", "cross_entropy")]
ALL = {"forward_kl": 0.7, "reverse_kl": 0.3, "jensen_shannon": 1.3, "mse": 0.2, "cosine": 3.0, "cross_entropy": 0.4}


@dataclass
class Case:
    """One micro-batch: leaves of autograd, and what the student is held against."""

    hidden: Tensor
    weight: Tensor
    labels: TokenLabels
    targets: list[WeightedTarget]
    settings: LossSettings
    group: Any

    def loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        return fused_distillation_loss(self.hidden, self.weight, self.labels, self.targets, self.settings, rows=ROWS, group=self.group)

    def plain(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The same from whole logits in fp64, the padded rows left out; differentiable."""
        student = self.hidden.double() @ self.weight[:ROWS].double().t()
        found = {"cross_entropy": cross_entropy(student, self.labels.labels_N)}
        for target in self.targets:
            exact = target.hidden_NE.dtype == torch.float32  # of bf16 logits as they are: rounded ones have another order
            hidden, weight = (x.double() if exact else x for x in (target.hidden_NE, target.weight_vE[:ROWS]))
            teacher = (hidden @ weight.t()).double()
            for name, loss in token_losses(student, teacher, self.settings.temperature, self.settings.top_k).items():
                found[name] = found.get(name, 0) + target.weight * loss
        sums = {name: (found[name] * self.labels.token_weights_N).sum() for name in self.settings.names}
        return self.settings.total(sums), sums

    def check(self, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
        """Sums and gradients; fp32 sums of 131 × 23 terms against fp64 by default."""
        total, sums = self.loss()
        expected, expected_sums = self.plain()
        torch.testing.assert_close(total.double(), expected, rtol=rtol, atol=atol)
        assert list(sums) == list(self.settings.names)
        for name, value in sums.items():
            torch.testing.assert_close(
                value.double(), expected_sums[name].detach(), rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )
        reference = torch.autograd.grad(expected, (self.hidden, self.weight))
        for actual, plain in zip(torch.autograd.grad(total, (self.hidden, self.weight)), reference, strict=True):
            torch.testing.assert_close(actual, plain, rtol=rtol, atol=atol)


def draw(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


@pytest.fixture
def case(layout: Any) -> Case:
    generator = torch.Generator().manual_seed(11)
    token_weights = torch.rand(N, generator=generator)
    token_weights[[0, 7, 22]] = 0
    return Case(
        hidden=draw(generator, N, D).requires_grad_(),
        weight=draw(generator, PADDED, D).mul_(0.5).requires_grad_(),
        labels=TokenLabels(torch.randint(ROWS, (N,), generator=generator), token_weights),
        targets=[WeightedTarget(draw(generator, N, E), draw(generator, PADDED, E) * 0.5)],
        settings=LossSettings(chunk_tokens=5),
        group=layout.groups.tp,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weights", [*ALONE, ALL], ids=lambda weights: "+".join(weights))
def test_each_loss_and_all_together_are_those_of_whole_logits(weights: dict[str, float], temperature: float, case: Case) -> None:
    case.settings = replace(case.settings, weights=weights, temperature=temperature)
    case.check()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5, 130])
def test_top_k_with_the_tail_as_one_class_is_that_of_whole_logits(k: int, temperature: float, case: Case) -> None:
    case.settings = replace(case.settings, weights={"forward_kl": 0.7, "cross_entropy": 0.4}, temperature=temperature, top_k=k)
    assert case.settings.names == ("forward_kl", "cross_entropy", "forward_kl_top_k")
    case.check()


def test_top_k_is_less_than_the_whole_kl_and_grows_with_k(case: Case) -> None:
    """Merging classes never raises a KL (the log-sum inequality)."""
    found = [replace(case, settings=replace(case.settings, top_k=k)).loss()[1] for k in (1, 4, 32, 130)]
    values = [float(sums["forward_kl_top_k"]) for sums in found]
    assert values == sorted(values) and values[0] < 0.7 * values[-1]
    assert values[-1] == pytest.approx(float(found[0]["forward_kl"]), rel=1e-6)  # 130 tokens and a tail of one: nothing is merged


def test_several_teachers_weigh_as_they_are_told(case: Case) -> None:
    """The second one is wider; the sums are Σ weight · loss."""
    generator = torch.Generator().manual_seed(12)
    case.targets = [replace(case.targets[0], weight=0.3), WeightedTarget(draw(generator, N, 2 * E), draw(generator, PADDED, 2 * E) * 0.3, 0.9)]
    for settings in (
        replace(case.settings, weights=ALL, temperature=2.0),
        replace(case.settings, weights={"forward_kl": 1.0}, top_k=7),
    ):
        case.settings = settings
        case.check()


def test_top_k_of_several_teachers_takes_chunks_of_one_token(case: Case) -> None:
    """The second teacher's candidates then lie at an odd place of what the all-gather gave."""
    case.targets = [replace(case.targets[0], weight=weight) for weight in (0.4, 0.6)]
    case.settings = replace(case.settings, top_k=7, chunk_tokens=22)  # 23 = 22 + 1
    case.check()


def test_forward_kl_to_several_teachers_pulls_towards_their_mean_distribution(case: Case) -> None:
    """What WeightedTarget says of the ensemble: the gradient is that of the KL to Σ weight · distribution."""
    generator = torch.Generator().manual_seed(12)
    case.targets = [replace(case.targets[0], weight=0.25), WeightedTarget(draw(generator, N, E), draw(generator, PADDED, E) * 0.5, 0.75)]
    [found] = torch.autograd.grad(case.loss()[0], [case.hidden])
    logits = [(target.hidden_NE @ target.weight_vE[:ROWS].t()).double() for target in case.targets]
    mean = sum(target.weight * logit.softmax(-1) for target, logit in zip(case.targets, logits, strict=True))
    log_p = (case.hidden @ case.weight[:ROWS].t()).double().log_softmax(-1)
    loss = -((mean * log_p).sum(-1) * case.labels.token_weights_N).sum()
    torch.testing.assert_close(found, torch.autograd.grad(loss, [case.hidden])[0], rtol=1e-5, atol=1e-5)


def test_without_a_teacher_the_labels_alone_count(case: Case) -> None:
    case.targets, case.settings = [], LossSettings({"cross_entropy": 0.8}, temperature=2.0, chunk_tokens=5, has_teacher=False)
    assert case.settings.names == ("cross_entropy",)
    case.check()


@pytest.mark.parametrize("has_teacher", [True, False])
def test_settings_and_teachers_that_disagree_are_refused(has_teacher: bool, case: Case) -> None:
    case.settings = replace(case.settings, has_teacher=has_teacher)
    case.targets = [] if has_teacher else case.targets
    with pytest.raises(ValueError, match="has_teacher"):
        case.loss()


def test_a_weight_may_be_a_tensor_or_nought(case: Case) -> None:
    """Dynamic weights stay on the device; a schedule may end at 0, and then a loss must have no gradient instead of an old one."""
    case.settings = replace(case.settings, weights={"forward_kl": torch.tensor(0.7), "mse": torch.tensor(0.2)})
    case.check()
    case.settings = replace(case.settings, weights={"reverse_kl": 0.0})
    case.check()
    assert torch.autograd.grad(case.loss()[0], case.hidden)[0].abs().max() == 0


@pytest.mark.parametrize("weights", [*ALONE, ALL], ids=lambda weights: "+".join(weights))
def test_padded_rows_and_tokens_of_weight_zero_are_invisible(weights: dict[str, float], case: Case) -> None:
    case.settings = replace(case.settings, weights=weights, top_k=None)
    before = torch.autograd.grad(case.loss()[0], (case.hidden, case.weight))
    silent = case.labels.token_weights_N == 0
    with torch.no_grad():
        case.weight[ROWS:] = 1000.0
        case.targets[0].weight_vE[ROWS:] = -1000.0
        case.hidden[silent] = 5.0
        case.targets[0].hidden_NE[silent] = -3.0
    after = torch.autograd.grad(case.loss()[0], (case.hidden, case.weight))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # to the bit
    assert after[0][silent].abs().max() == 0 and after[1][ROWS:].abs().max() == 0


@pytest.mark.parametrize("k", [None, 5])
def test_bf16_is_within_a_hundredth_of_fp64(k: int | None, case: Case) -> None:
    case.hidden, case.weight = case.hidden.detach().bfloat16().requires_grad_(), case.weight.detach().bfloat16().requires_grad_()
    [target] = case.targets
    case.targets = [WeightedTarget(target.hidden_NE.bfloat16(), target.weight_vE.bfloat16())]
    case.settings = replace(case.settings, weights={"forward_kl": 1.0} if k else ALL, top_k=k)
    total, expected = case.loss()[0], case.plain()[0]
    torch.testing.assert_close(total.double(), expected, rtol=1e-2, atol=0)  # bf16 logits have 8 bits
    reference = torch.autograd.grad(expected, (case.hidden, case.weight))
    for actual, plain in zip(torch.autograd.grad(total, (case.hidden, case.weight)), reference, strict=True):
        assert (actual.double() - plain.double()).norm() / plain.double().norm() < 1e-2


@pytest.mark.parametrize("weights", [*ALONE, ALL], ids=lambda weights: "+".join(weights))
def test_a_teacher_in_bf16_beside_a_student_in_fp32_rounds_its_own_logits_alone(weights: dict[str, float], case: Case) -> None:
    [target] = case.targets
    case.targets = [WeightedTarget(target.hidden_NE.bfloat16(), target.weight_vE.bfloat16())]
    case.settings = replace(case.settings, weights=weights)
    case.check()  # as exact as with an fp32 teacher: the reference, too, has its logits in bf16


@pytest.mark.parametrize("k", [None, 5])
def test_a_teacher_in_fp32_teaches_a_student_in_bf16(k: int | None, case: Case) -> None:
    case.hidden, case.weight = case.hidden.detach().bfloat16().requires_grad_(), case.weight.detach().bfloat16().requires_grad_()
    case.settings = replace(case.settings, weights={"forward_kl": 1.0} if k else ALL, top_k=k)
    total, expected = case.loss()[0], case.plain()[0]
    torch.testing.assert_close(total.double(), expected, rtol=1e-2, atol=0)  # the student's logits have 8 bits
    reference = torch.autograd.grad(expected, (case.hidden, case.weight))
    for actual, plain in zip(torch.autograd.grad(total, (case.hidden, case.weight)), reference, strict=True):
        assert actual.dtype == torch.bfloat16 and (actual.double() - plain.double()).norm() / plain.double().norm() < 1e-2


def test_large_logits_overflow_nowhere(case: Case) -> None:
    """Logits of several hundred: exp() of them is infinite, and both models are certain."""
    with torch.no_grad():
        case.hidden *= 60
        case.targets[0].hidden_NE.mul_(60)
    for settings in (replace(case.settings, weights=ALL), replace(case.settings, top_k=3)):
        case.settings = settings
        total = case.loss()[0]
        torch.testing.assert_close(total.double(), replace_top_k_by_logs(case), rtol=1e-5, atol=0)
        assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(total, (case.hidden, case.weight)))


def replace_top_k_by_logs(case: Case) -> Tensor:
    """plain() sums probabilities, and 1 − Σ is nothing here: the tail's logarithm from its logits, in fp64."""
    if case.settings.top_k is None:
        return with_finite_middle(case)
    student, teacher = (hidden.double() @ weight[:ROWS].double().t() for hidden, weight in both(case))
    ids = teacher.topk(case.settings.top_k).indices
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    classes = [torch.cat([x.gather(-1, ids), x.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)], dim=-1) for x in (log_q, log_p)]
    return ((classes[0].exp() * (classes[0] - classes[1])).sum(-1) * case.labels.token_weights_N).sum()


def both(case: Case) -> list[tuple[Tensor, Tensor]]:
    return [(case.hidden, case.weight), (case.targets[0].hidden_NE, case.targets[0].weight_vE)]


def with_finite_middle(case: Case) -> Tensor:
    """plain()'s mean of two probabilities that are 0 in fp64 has no logarithm; KL to it is 0 there."""
    student, teacher = (hidden.double() @ weight[:ROWS].double().t() for hidden, weight in both(case))
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    found = token_losses(student, teacher) | {"cross_entropy": cross_entropy(student, case.labels.labels_N)}
    found["jensen_shannon"] = sum((x.exp() * (x - middle)).sum(-1) for x in (log_p, log_q)) / 2  # type: ignore[assignment]
    return case.settings.total({name: (found[name] * case.labels.token_weights_N).sum() for name in ALL})


def softmax_of(logits: Tensor) -> Softmax:
    peaks, norms = shard_sums(logits)[None].unbind(-1)
    return Softmax.of(logits, peaks, norms)


def test_of_equal_logits_the_lower_ids_are_the_top_k(layout: Any) -> None:
    """bf16 logits are often equal at the cut; ids must not depend on how many ranks there are."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, -0.5, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [-3.0, -2.0, -2.0, -9.0, -2.5, -2.0]])
    shard = Shard(0, layout.groups.tp)
    found = top_k.live(softmax_of(logits), top_k.candidates(logits, logits, shard, k=3)[None], k=3)
    assert found.ids_nK.tolist() == [[1, 2, 3], [0, 1, 2], [1, 2, 5]]
    torch.testing.assert_close(found.log_probs_nK, logits.log_softmax(-1).gather(-1, found.ids_nK))
    torch.testing.assert_close(found.log_tail_n.exp(), 1 - found.log_probs_nK.exp().sum(-1))


def test_a_stored_teacher_gives_the_loss_of_a_live_one(case: Case) -> None:
    """Only ids and log-probabilities of K tokens are known: the tail is what is missing to 1."""
    teacher = case.targets[0].hidden_NE @ case.targets[0].weight_vE[:ROWS].t()
    student = (case.hidden @ case.weight[:ROWS].t()).detach()
    shard = Shard(0, case.group)
    live = top_k.live(softmax_of(teacher), top_k.candidates(student, teacher, shard, k=6)[None], k=6)
    losses = [top_k.top_k_kl(softmax_of(student), target, shard) for target in (live, top_k.stored(live.ids_nK, live.log_probs_nK))]
    torch.testing.assert_close(losses[0].value_n, losses[1].value_n, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses[0].gradient(), losses[1].gradient(), rtol=1e-5, atol=1e-6)


def test_a_stored_teacher_that_is_certain_leaves_no_tail(case: Case) -> None:
    shard, student = Shard(0, case.group), torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    target = top_k.stored(torch.tensor([[3], [6]]), torch.zeros(2, 1))
    loss = top_k.top_k_kl(softmax_of(student), target, shard)
    expected = student.softmax(-1)
    torch.testing.assert_close(loss.value_n, -student.log_softmax(-1)[[0, 1], [3, 6]])  # cross-entropy of a hard label
    torch.testing.assert_close(loss.gradient(), expected - torch.nn.functional.one_hot(torch.tensor([3, 6]), 7))


@pytest.mark.parametrize(
    ("settings", "gathers"),
    [
        (LossSettings(chunk_tokens=5), 1),
        (LossSettings({name: weight for name, weight in ALL.items() if name != "jensen_shannon"}, temperature=2.0, chunk_tokens=5), 1),
        (LossSettings(ALL, chunk_tokens=5), 2),
        (LossSettings(top_k=4, chunk_tokens=5), 2),
        (LossSettings({"cross_entropy": 1.0}, chunk_tokens=5, has_teacher=False), 1),
    ],
)
def test_a_chunk_costs_one_all_gather_and_jensen_shannon_and_top_k_one_more(
    settings: LossSettings, gathers: int, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    for module, name in ((chunk, "begin_gather_first"), (terms, "gather_first"), (top_k, "gather_first")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda x, group, real=real: calls.append(x) or real(x, group))
    case.settings, case.targets = settings, case.targets if settings.has_teacher else []
    case.loss()
    assert len(calls) == gathers * 5  # 23 = 4 × 5 + 3


@pytest.mark.parametrize("weight", [0.7, 0.0, torch.tensor(0.7)], ids=["number", "nought", "tensor"])
def test_forward_kl_in_place_is_forward_kl_by_the_way_of_all_losses(weight: float | Tensor, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums, loss and gradients; the gradient is made of the same exponentials, rounded once more."""
    case.settings, case.targets = replace(case.settings, weights={"forward_kl": weight}), [replace(case.targets[0], weight=0.9)]
    served: list[bool] = []
    found = []
    for real in (in_place.serves, lambda block, settings: False):
        monkeypatch.setattr(in_place, "serves", lambda block, settings, real=real: served.append(real(block, settings)) or served[-1])
        total, sums = case.loss()
        found.append([total, *sums.values(), *torch.autograd.grad(total, (case.hidden, case.weight))])
    assert any(served) and not all(served)
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)


def test_the_jensen_shannon_divergence_is_symmetric_and_at_most_ln_2(case: Case) -> None:
    swapped = replace(case, hidden=case.targets[0].hidden_NE, weight=case.targets[0].weight_vE, targets=[WeightedTarget(case.hidden, case.weight)])
    found = []
    for item in (case, swapped):
        item.settings = replace(item.settings, weights={"jensen_shannon": 1.0})
        with torch.no_grad():
            found.append(float(item.loss()[0]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert 0 < found[0] < math.log(2) * float(case.labels.token_weights_N.sum())
