"""How far two next-token distributions are apart, over a vocabulary sharded by tensor parallelism.

Legend: n tokens, v this rank's rows of the vocabulary, r tensor ranks.
The mathematics is that of the design's KD loss: each rank reduces its shard to six numbers a token, one all-gather
carries them, log-sum-exp weights combine them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.parallel.collectives import gather_first


class Divergence(NamedTuple):
    """Per token [n], fp32, equal on every tensor rank."""

    forward_kl_n: Tensor
    """KL(teacher ‖ student) in nats, at the temperature of the logits that were given."""
    student_log_norm_n: Tensor
    teacher_log_norm_n: Tensor
    label_logit_n: Tensor


class Softmax(NamedTuple):
    """A distribution over the whole vocabulary: this rank's logits, and what all ranks together know of each token."""

    logits_nv: Tensor
    log_norm_n: Tensor
    """ln Σ exp over the whole vocabulary."""
    norm_n: Tensor
    """The same sum relative to the highest logit."""
    weights_rn: Tensor
    """exp(a shard's peak − the highest logit): what makes sums relative to a shard's peak ones over the whole vocabulary."""

    @staticmethod
    def of(logits_nv: Tensor, peaks_rn: Tensor, norms_rn: Tensor) -> Softmax:
        """norms_rn: Σ exp(x − peak) of each shard."""
        log_norm_n, weights_rn = log_normaliser(peaks_rn, norms_rn)
        return Softmax(logits_nv, log_norm_n, (norms_rn * weights_rn).sum(0), weights_rn)

    def mean(self, sums_rn: Tensor) -> Tensor:
        """[n] expectation of a quantity, from Σ exp(x − peak) · quantity of each shard."""
        return (sums_rn * self.weights_rn).sum(0) / self.norm_n


def divergence(student_nv: Tensor, teacher_nv: Tensor, labels_n: Tensor, *, first_row: int, group: dist.ProcessGroup) -> Divergence:
    """Forward KL, both normalisers and the student's logit of the label.

    student_nv, teacher_nv: [n, v] fp32 logits of this rank's real rows; labels_n: [n] global token ids; first_row: global id of row 0.
    """
    label_n = label_logits(student_nv, labels_n, first_row=first_row)
    sums_n6 = torch.cat([shard_sums(student_nv), crossed_sums(student_nv, teacher_nv), label_n[:, None]], dim=-1)
    peaks_s, norms_s, *crossed, labels = gather_first(sums_n6, group).unbind(-1)
    student = Softmax.of(student_nv, peaks_s, norms_s)
    teacher, kl_n = forward_kl(student, teacher_nv, crossed)
    return Divergence(kl_n, student.log_norm_n, teacher.log_norm_n, labels.sum(0))


def shard_sums(logits_nv: Tensor) -> Tensor:
    """[n, 2] this shard's peak and Σ exp(x − peak)."""
    peak_n = logits_nv.amax(-1)
    return torch.stack([peak_n, (logits_nv - peak_n[:, None]).exp_().sum(-1)], dim=-1)


def crossed_sums(student_nv: Tensor, teacher_nv: Tensor) -> Tensor:
    """[n, 3] the teacher's shard_sums, and Σ exp(t − peak) · (t − s)."""
    peak_n = teacher_nv.amax(-1)
    weights_nv = (teacher_nv - peak_n[:, None]).exp_()
    return torch.stack([peak_n, weights_nv.sum(-1), (teacher_nv - student_nv).mul_(weights_nv).sum(-1)], dim=-1)


def forward_kl(student: Softmax, teacher_nv: Tensor, crossed_rn: Sequence[Tensor]) -> tuple[Softmax, Tensor]:
    """The teacher's distribution and [n] KL(teacher ‖ student), from every rank's crossed_sums."""
    peaks_t, norms_t, crosses = crossed_rn
    teacher = Softmax.of(teacher_nv, peaks_t, norms_t)
    return teacher, teacher.mean(crosses) - teacher.log_norm_n + student.log_norm_n


def log_normaliser(peaks_rn: Tensor, norms_rn: Tensor) -> tuple[Tensor, Tensor]:
    """ln Σ exp over all shards from each shard's peak and Σ exp(x − peak): [n], and each shard's weight exp(peak − highest): [r, n]."""
    highest = peaks_rn.amax(0)
    weights = (peaks_rn - highest).exp()
    return highest + (norms_rn * weights).sum(0).log(), weights


def label_logits(logits_nv: Tensor, labels_n: Tensor, *, first_row: int) -> Tensor:
    """[n] the logit of each label that lies in this shard, else 0."""
    row = labels_n - first_row
    inside = (row >= 0) & (row < logits_nv.shape[-1])
    found = logits_nv.gather(-1, row.clamp(0, logits_nv.shape[-1] - 1)[:, None])[:, 0]
    return torch.where(inside, found, found.new_zeros(()))


def log_normalisers(logits_nv: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n] ln Σ exp of logits sharded over the group."""
    gathered = gather_first(shard_sums(logits_nv), group)
    return log_normaliser(gathered[..., 0], gathered[..., 1])[0]


def global_argmax(logits_nv: Tensor, *, first_row: int, group: dist.ProcessGroup) -> Tensor:
    """[n] global token id of the largest logit; the lower id where two are equal."""
    peak, row = logits_nv.max(-1)
    peaks_rn = gather_first(peak, group)
    rows_rn = gather_first(row + first_row, group)
    best = peaks_rn.max(0, keepdim=True).values
    return torch.where(peaks_rn == best, rows_rn, rows_rn.new_full((), torch.iinfo(torch.long).max)).amin(0)
