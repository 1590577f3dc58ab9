"""Losses between the logits of teacher and student that are reduced over a vocabulary sharded by tensor parallelism.

Legend: n tokens of a chunk, v this rank's rows of the vocabulary, V all of them, r tensor ranks.
All logits are at the temperature. With x = raw logits / T a loss f(x) counts T^power · f, so that its gradient of the raw logits is
T^(power − 1) · f'(x): power 2 keeps the gradient's size whatever the temperature (arXiv 1503.02531, section 2).
P1 = arXiv 2407.14679; its ablation of losses has KL, reverse KL, MSE and cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.model.divergence import Softmax
from minitron_megatron.parallel.collectives import gather_first


class Shard(NamedTuple):
    """Which part of the vocabulary is here."""

    first_row: int
    """Global token id of row 0."""
    group: dist.ProcessGroup


class Loss(NamedTuple):
    value_n: Tensor
    """Equal on every rank."""
    gradient: Callable[[], Tensor]
    """[n, v] of the student's logits at the temperature; to be called once, and only where it is wanted."""


class Term(NamedTuple):
    """How one loss comes about: numbers of each shard, which one all-gather carries for all terms, then the loss."""

    sums: Callable[[Tensor, Tensor, Shard], Tensor]
    """(student [n, v], teacher [n, v], shard) → [n, k]"""
    loss: Callable[[Softmax, Softmax, Tensor, Shard], Loss]
    """(student, teacher, sums [r, n, k], shard)"""
    power: int = 2


def probabilities(softmax: Softmax) -> Tensor:
    return (softmax.logits_nv - softmax.log_norm_n[:, None]).exp_()


def reverse_kl_sums(student_nv: Tensor, teacher_nv: Tensor, shard: Shard) -> Tensor:
    """[n, 1] Σ exp(s − peak) · (s − t)"""
    weights_nv = (student_nv - student_nv.amax(-1, keepdim=True)).exp_()
    return (student_nv - teacher_nv).mul_(weights_nv).sum(-1, keepdim=True)


def reverse_kl(student: Softmax, teacher: Softmax, sums_rnk: Tensor, shard: Shard) -> Loss:
    """KL(student ‖ teacher) in nats (P1; MiniLLM, arXiv 2306.08543): it keeps the student off tokens that the teacher thinks unlikely."""
    kl_n = student.mean(sums_rnk[..., 0]) - student.log_norm_n + teacher.log_norm_n

    def gradient() -> Tensor:
        """p · (ln p − ln q − KL)"""
        difference_nv = student.logits_nv - teacher.logits_nv
        difference_nv += (teacher.log_norm_n - student.log_norm_n - kl_n)[:, None]
        return difference_nv.mul_((student.logits_nv - student.log_norm_n[:, None]).exp_())

    return Loss(kl_n, gradient)


def no_sums(student_nv: Tensor, teacher_nv: Tensor, shard: Shard) -> Tensor:
    return student_nv.new_empty(student_nv.shape[0], 0)


def jensen_shannon(student: Softmax, teacher: Softmax, sums_rnk: Tensor, shard: Shard) -> Loss:
    """½ KL(teacher ‖ m) + ½ KL(student ‖ m) of the mean m of both distributions, in nats, at most ln 2 (Lin 1991; as a loss: arXiv 2306.13649).

    m needs both normalisers first: one more all-gather.
    """
    log_p = student.logits_nv - student.log_norm_n[:, None]
    log_q = teacher.logits_nv - teacher.log_norm_n[:, None]
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))
    above_q = log_q.exp().mul_(log_q.sub_(log_m)).sum(-1)
    above_p = log_p.sub_(log_m)  # ln p − ln m from here on; p itself comes from the logits again
    sums_n2 = torch.stack([above_q, probabilities(student).mul_(above_p).sum(-1)], dim=-1)
    from_teacher_n, from_student_n = gather_first(sums_n2, shard.group).sum(0).unbind(-1)

    def gradient() -> Tensor:
        """½ p · (ln p − ln m − KL(p ‖ m))"""
        return above_p.sub_(from_student_n[:, None]).mul_(probabilities(student)).mul_(0.5)

    return Loss((from_teacher_n + from_student_n) / 2, gradient)


def mse_sums(student_nv: Tensor, teacher_nv: Tensor, shard: Shard) -> Tensor:
    """[n, 2] Σ (s − t)², and this shard's real rows"""
    squares_n = (student_nv - teacher_nv).square_().sum(-1)
    return torch.stack([squares_n, torch.full_like(squares_n, student_nv.shape[-1])], dim=-1)


def mse(student: Softmax, teacher: Softmax, sums_rnk: Tensor, shard: Shard) -> Loss:
    """Mean over the real vocabulary of the squared difference of the logits as they are, not centred (arXiv 1312.6184; P1's ablation).

    The temperature cancels against its square. A student whose logits are the teacher's plus a constant is charged for the constant.
    """
    squares_n, rows_n = sums_rnk.sum(0).unbind(-1)
    return Loss(squares_n / rows_n, lambda: (student.logits_nv - teacher.logits_nv).mul_((2 / rows_n)[:, None]))


def cosine_sums(student_nv: Tensor, teacher_nv: Tensor, shard: Shard) -> Tensor:
    """[n, 3] s · t, s · s, t · t"""
    pairs = ((student_nv, teacher_nv), (student_nv, student_nv), (teacher_nv, teacher_nv))
    return torch.stack([(a * b).sum(-1) for a, b in pairs], dim=-1)


def cosine(student: Softmax, teacher: Softmax, sums_rnk: Tensor, shard: Shard) -> Loss:
    """1 − cosine of the two vectors of logits as they are, over the real vocabulary (P1's ablation); it knows no temperature."""
    product_n, square_s, square_t = sums_rnk.sum(0).unbind(-1)
    size_s, size_t = (square.sqrt().clamp_min(1e-8) for square in (square_s, square_t))
    cosine_n = product_n / (size_s * size_t)

    def gradient() -> Tensor:
        """(cos · s/|s| − t/|t|) / |s|"""
        along_nv = student.logits_nv * (cosine_n / size_s.square())[:, None]
        return along_nv.sub_(teacher.logits_nv / (size_s * size_t)[:, None])

    return Loss(1 - cosine_n, gradient)


TERMS = {
    "reverse_kl": Term(reverse_kl_sums, reverse_kl),
    "jensen_shannon": Term(no_sums, jensen_shannon),
    "mse": Term(mse_sums, mse),
    "cosine": Term(cosine_sums, cosine, power=0),
}
