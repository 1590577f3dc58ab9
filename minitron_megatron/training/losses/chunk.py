"""The losses of a chunk of tokens and the gradient of its logits, over a vocabulary sharded by tensor parallelism.

Legend: n tokens of a chunk, v this rank's rows of the vocabulary, r tensor ranks.
Each rank reduces its shard to some numbers a token, one all-gather a teacher carries them (the student's come with the first
teacher's), and log-sum-exp weights combine them. Jensen–Shannon and top-K need one more. One teacher's logits exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minitron_megatron.model.divergence import Softmax, crossed_sums, forward_kl, label_logits, log_normaliser, shard_sums
from minitron_megatron.parallel.collectives import gather_first
from minitron_megatron.training.losses.settings import TOP_K, LossSettings
from minitron_megatron.training.losses.target import StoredTarget
from minitron_megatron.training.losses.terms import TERMS, Shard, Term
from minitron_megatron.training.losses.top_k import top_k_term


@dataclass
class _Sums:
    """What a chunk's losses add up to."""

    needs_grad: bool
    values: dict[str, Tensor] = field(default_factory=dict)
    gradient_nv: Tensor | None = None

    def add(self, name: str, value_n: Tensor) -> None:
        self.values[name] = self.values[name] + value_n if name in self.values else value_n

    def add_gradient(self, weight: float | Tensor, gradient: Callable[[], Tensor]) -> None:
        if self.needs_grad and not (isinstance(weight, int | float) and weight == 0):
            part_nv = gradient().mul_(weight)
            self.gradient_nv = part_nv if self.gradient_nv is None else self.gradient_nv.add_(part_nv)


class _Student(NamedTuple):
    at_temperature: Softmax
    raw_log_norm_n: Tensor
    label_logit_n: Tensor


def chunk_losses(
    raw_nv: Tensor,
    labels_n: Tensor,
    teachers: Iterable[tuple[Tensor, float]],
    settings: LossSettings,
    shard: Shard,
    *,
    needs_grad: bool,
    stored: Sequence[StoredTarget] = (),
) -> tuple[dict[str, Tensor], Tensor | None]:
    """[n] of each loss of settings.names, equal on every rank, and the gradient of the weighted losses [n, v].

    raw_nv: the student's logits of this rank's real rows, fp32. teachers: logits at the temperature, which are used up, and the weight of each;
    taken one after another. stored: of teachers that make no logits, of this chunk.
    """
    student_nv = raw_nv / settings.temperature if settings.temperature != 1 else raw_nv
    own = _student_sums(raw_nv, student_nv, label_logits(raw_nv, labels_n, first_row=shard.first_row))
    terms, found, student = _terms(settings), _Sums(needs_grad), None
    for teacher_nv, share in teachers:
        crossed = [crossed_sums(student_nv, teacher_nv), *(term.sums(student_nv, teacher_nv, shard) for term in terms.values())]
        first, *others = _gather([own, *crossed] if student is None else crossed, shard)
        if student is None:
            student, (first, *others) = _student(student_nv, first), others
        _hold_against(found, student.at_temperature, teacher_nv, first, dict(zip(terms, others, strict=True)), settings, shard, share)
        del teacher_nv  # before the next one's are made
    student = student or _student(student_nv, *_gather([own], shard))
    for target in stored:
        loss, share = target.loss(student.at_temperature, shard), target.weight
        found.add(target.name, settings.temperature**2 * share * loss.value_n)
        found.add_gradient(settings.objective[target.name] * share * settings.temperature, loss.gradient)
    found.add("cross_entropy", student.raw_log_norm_n - student.label_logit_n)
    log_norm_n = student.raw_log_norm_n
    found.add_gradient(settings.objective.get("cross_entropy", 0.0), lambda: _cross_entropy_gradient(raw_nv, log_norm_n, labels_n - shard.first_row))
    return found.values, found.gradient_nv


def _terms(settings: LossSettings) -> dict[str, Term]:
    """Those of the objective that have sums of their own; KL and cross-entropy are always there."""
    known = TERMS | ({TOP_K: top_k_term(settings.top_k)} if settings.top_k else {})
    return {name: known[name] for name in settings.objective if name in known}


def _hold_against(
    found: _Sums,
    student: Softmax,
    teacher_nv: Tensor,
    crossed_rn3: Tensor,
    sums: dict[str, Tensor],
    settings: LossSettings,
    shard: Shard,
    share: float,
) -> None:
    """Adds the losses against one teacher. sums: [r, n, k] of each term."""
    temperature, terms = settings.temperature, _terms(settings)
    teacher, kl_n = forward_kl(student, teacher_nv, crossed_rn3.unbind(-1))
    for name, sums_rnk in sums.items():
        loss, power = terms[name].loss(student, teacher, sums_rnk, shard), terms[name].power
        found.add(name, temperature**power * share * loss.value_n)
        found.add_gradient(settings.objective[name] * share * temperature ** (power - 1), loss.gradient)
    found.add("forward_kl", temperature**2 * share * kl_n)
    found.add_gradient(settings.objective.get("forward_kl", 0.0) * share * temperature, lambda: _kl_gradient(student, teacher))


def _gather(parts: Sequence[Tensor], shard: Shard) -> list[Tensor]:
    """Each [n, k] → [r, n, k]; one all-gather for all of them."""
    gathered = gather_first(torch.cat(list(parts), dim=-1), shard.group)
    return list(gathered.split([part.shape[-1] for part in parts], dim=-1))


def _student_sums(raw_nv: Tensor, student_nv: Tensor, label_logit_n: Tensor) -> Tensor:
    """[n, 3] peak, Σ exp(x − peak) and the label's logit; at another temperature than 1 both sums of the raw logits too."""
    parts = [shard_sums(student_nv), label_logit_n[:, None]]
    return torch.cat(parts if student_nv is raw_nv else [*parts, shard_sums(raw_nv)], dim=-1)


def _student(student_nv: Tensor, sums_rnk: Tensor) -> _Student:
    peaks, norms, labels, *raw = sums_rnk.unbind(-1)
    softmax = Softmax.of(student_nv, peaks, norms)
    raw_log_norm_n = log_normaliser(*raw)[0] if raw else softmax.log_norm_n
    return _Student(softmax, raw_log_norm_n, labels.sum(0))


def _kl_gradient(student: Softmax, teacher: Softmax) -> Tensor:
    """softmax(student) − softmax(teacher); the teacher's logits are used up."""
    gradient = (student.logits_nv - student.log_norm_n[:, None]).exp_()
    return gradient.sub_(teacher.logits_nv.sub_(teacher.log_norm_n[:, None]).exp_())


def _cross_entropy_gradient(raw_nv: Tensor, log_norm_n: Tensor, row_n: Tensor) -> Tensor:
    """softmax − one-hot of the labels that lie in this shard."""
    gradient = (raw_nv - log_norm_n[:, None]).exp_()
    inside = (row_n >= 0) & (row_n < raw_nv.shape[-1])
    tokens = inside.nonzero()[:, 0]
    gradient[tokens, row_n[tokens]] -= 1
    return gradient
