"""How far two next-token distributions are apart, over a vocabulary sharded by tensor parallelism.

Legend: n tokens, v this rank's rows of the vocabulary, r tensor ranks.
The mathematics is that of the design's KD loss: each rank reduces its shard to six numbers a token, one all-gather
carries them, log-sum-exp weights combine them.
"""

from __future__ import annotations

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


def divergence(student_nv: Tensor, teacher_nv: Tensor, labels_n: Tensor, *, first_row: int, group: dist.ProcessGroup) -> Divergence:
    """Forward KL, both normalisers and the student's logit of the label.

    student_nv, teacher_nv: [n, v] fp32 logits of this rank's real rows; labels_n: [n] global token ids; first_row: global id of row 0.
    """
    peak_s, peak_t = student_nv.amax(-1), teacher_nv.amax(-1)
    weights_t = (teacher_nv - peak_t[:, None]).exp_()
    sums_n6 = torch.stack(
        [
            peak_s,
            (student_nv - peak_s[:, None]).exp_().sum(-1),
            peak_t,
            weights_t.sum(-1),
            (weights_t * (teacher_nv - student_nv)).sum(-1),
            label_logits(student_nv, labels_n, first_row=first_row),
        ],
        dim=-1,
    )
    return _combine(gather_first(sums_n6, group))


def _combine(sums_rn6: Tensor) -> Divergence:
    peaks_s, norms_s, peaks_t, norms_t, crosses, labels = sums_rn6.unbind(-1)
    log_norm_s, _ = log_normaliser(peaks_s, norms_s)
    log_norm_t, weights_t = log_normaliser(peaks_t, norms_t)
    norm_t = (norms_t * weights_t).sum(0)
    kl = (crosses * weights_t).sum(0) / norm_t - log_norm_t + log_norm_s
    return Divergence(kl, log_norm_s, log_norm_t, labels.sum(0))


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
    peak = logits_nv.amax(-1)
    norm = (logits_nv - peak[:, None]).exp_().sum(-1)
    gathered = gather_first(torch.stack([peak, norm], dim=-1), group)
    return log_normaliser(gathered[..., 0], gathered[..., 1])[0]


def global_argmax(logits_nv: Tensor, *, first_row: int, group: dist.ProcessGroup) -> Tensor:
    """[n] global token id of the largest logit; the lower id where two are equal."""
    peak, row = logits_nv.max(-1)
    peaks_rn = gather_first(peak, group)
    rows_rn = gather_first(row + first_row, group)
    best = peaks_rn.max(0, keepdim=True).values
    return torch.where(peaks_rn == best, rows_rn, rows_rn.new_full((), torch.iinfo(torch.long).max)).amin(0)
