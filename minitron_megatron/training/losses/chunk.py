"""The losses of a chunk of tokens and the gradient of its logits, over a vocabulary sharded by tensor parallelism.

Legend: n tokens of a chunk, v this rank's rows of the vocabulary, r tensor ranks.
Each rank reduces its shard to some numbers a token, one all-gather a teacher carries them (the student's come with the first
teacher's), and log-sum-exp weights combine them. One teacher's logits exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.model.divergence import Softmax, crossed_sums, forward_kl, label_logits, log_normaliser, shard_sums
from minitron_megatron.parallel.collectives import gather_first
from minitron_megatron.training.losses.settings import LossSettings


class _Student(NamedTuple):
    at_temperature: Softmax
    raw_log_norm_n: Tensor
    label_logit_n: Tensor


def chunk_losses(
    raw_nv: Tensor,
    labels_n: Tensor,
    teachers: Iterable[tuple[Tensor, float]],
    settings: LossSettings,
    *,
    first_row: int,
    group: dist.ProcessGroup,
    needs_grad: bool,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """[n] of each loss of settings.names, equal on every rank, and the gradient of the weighted losses [n, v].

    raw_nv: the student's logits of this rank's real rows, fp32. teachers: logits at the temperature, which are used up, and the weight of each;
    taken one after another.
    """
    student_nv = raw_nv / settings.temperature if settings.temperature != 1 else raw_nv
    sums = _student_sums(raw_nv, student_nv, label_logits(raw_nv, labels_n, first_row=first_row))
    student: _Student | None = None
    values: dict[str, Tensor] = {}
    gradient: Tensor | None = None
    for teacher_nv, share in teachers:
        crossed = crossed_sums(student_nv, teacher_nv)
        gathered = gather_first(crossed if student else torch.cat([sums, crossed], dim=-1), group)
        if student is None:
            student, gathered = _student(student_nv, gathered[..., : sums.shape[-1]]), gathered[..., sums.shape[-1] :]
        teacher, kl_n = forward_kl(student.at_temperature, teacher_nv, gathered.unbind(-1))
        kl_n = settings.temperature**2 * share * kl_n
        values["forward_kl"] = values["forward_kl"] + kl_n if "forward_kl" in values else kl_n
        if needs_grad and "forward_kl" in settings.weights:
            part = _kl_gradient(student.at_temperature, teacher).mul_(settings.weights["forward_kl"] * share * settings.temperature)
            gradient = part if gradient is None else gradient.add_(part)
        del teacher_nv, teacher  # before the next one's are made
    student = student or _student(student_nv, gather_first(sums, group))
    values["cross_entropy"] = student.raw_log_norm_n - student.label_logit_n
    if needs_grad and "cross_entropy" in settings.weights:
        part = _cross_entropy_gradient(raw_nv, student.raw_log_norm_n, labels_n - first_row).mul_(settings.weights["cross_entropy"])
        gradient = part if gradient is None else gradient.add_(part)
    return values, gradient


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
