"""Forward KL to a teacher of whom the K likeliest tokens are known, all others being one class.

Renormalising over the K tokens instead would be biased (arXiv 2503.16870); P1 (arXiv 2407.14679) found K ≤ 100 worse than all.
Legend: n tokens of a chunk, v this rank's rows of the vocabulary, K classes of one token, r tensor ranks.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from minitron_megatron.model.divergence import Softmax, log_normaliser
from minitron_megatron.parallel.collectives import gather_first
from minitron_megatron.training.losses.terms import Loss, Shard, Term


class TopK(NamedTuple):
    """A teacher's distribution over K + 1 classes, equal on every rank; from logits (live) or from a file (stored)."""

    ids_nK: Tensor
    """Global token ids, each once."""
    log_probs_nK: Tensor
    """Of the distribution over the whole vocabulary, at the loss's temperature."""
    log_tail_n: Tensor
    """ln of what all other tokens have together; −inf where that is nothing."""


def stored(ids_nK: Tensor, log_probs_nK: Tensor) -> TopK:
    """The tail is what is missing to 1."""
    return TopK(ids_nK, log_probs_nK, torch.log1p(-log_probs_nK.exp().sum(-1).clamp_max(1.0)))


def candidates(student_nv: Tensor, teacher_nv: Tensor, shard: Shard, *, k: int) -> Tensor:
    """[n, 2K + 2] keys of this shard's K largest logits, and peak and Σ exp(x − peak) of its others."""
    keys_nK = _keys(teacher_nv, shard.first_row).topk(min(k, teacher_nv.shape[-1]), dim=-1).values
    others_n2 = _sums_without(teacher_nv.scatter(-1, _ids(keys_nK) - shard.first_row, -torch.inf))
    missing = keys_nK.new_full((len(keys_nK), k - keys_nK.shape[-1]), NO_KEY)
    return torch.cat([torch.cat([keys_nK, missing], dim=-1).view(torch.float32), others_n2], dim=-1)  # the keys' bits, carried as they are


def live(teacher: Softmax, candidates_rnc: Tensor, *, k: int) -> TopK:
    """The K likeliest of all ranks' candidates; of equally likely tokens the lower ids. K must be less than the vocabulary."""
    bits_rnc = candidates_rnc[..., : 2 * k].clone(memory_format=torch.contiguous_format)  # contiguous() of one token keeps an odd offset
    keys_nC = bits_rnc.view(torch.int64).transpose(0, 1).flatten(1)
    keys_nK = keys_nC.topk(k, dim=-1).values
    left_nC = _logits(keys_nC).masked_fill(keys_nC >= keys_nK[:, -1:], -torch.inf)
    others_rn = candidates_rnc[..., -2] + candidates_rnc[..., -1].log()
    log_tail_n = torch.cat([left_nC, others_rn.t()], dim=-1).logsumexp(-1) - teacher.log_norm_n
    return TopK(_ids(keys_nK), _logits(keys_nK) - teacher.log_norm_n[:, None], log_tail_n)


def top_k_kl(student: Softmax, target: TopK, shard: Shard) -> Loss:
    """Σ over K + 1 classes of q · (ln q − ln p) in nats; p of the last class is the student's mass outside the K tokens.

    One all-gather. The tail's logarithm comes from its own logits, because 1 − Σ p loses a small tail.
    """
    rows_nK = target.ids_nK - shard.first_row
    tokens, classes = ((rows_nK >= 0) & (rows_nK < student.logits_nv.shape[-1])).nonzero(as_tuple=True)
    rows = rows_nK[tokens, classes]
    log_q = target.log_probs_nK[tokens, classes]
    log_p = student.logits_nv[tokens, rows] - student.log_norm_n[tokens]
    here_n = torch.zeros_like(student.log_norm_n).index_add_(0, tokens, log_q.exp() * (log_q - log_p))
    tail_nv = student.logits_nv.index_put((tokens, rows), log_p.new_tensor(-torch.inf))
    heres, peaks, norms = gather_first(torch.cat([here_n[:, None], _sums_without(tail_nv)], dim=-1), shard.group).unbind(-1)
    tail_norm_n = log_normaliser(peaks, norms)[0]
    difference_n = target.log_tail_n - (tail_norm_n - student.log_norm_n)
    of_tail_n = torch.where(target.log_tail_n > -torch.inf, target.log_tail_n.exp() * difference_n, 0.0)

    def gradient() -> Tensor:
        """p − q for the K tokens, p − q_tail · (the token's share of the student's tail) for the others."""
        gradient_nv = (student.logits_nv - student.log_norm_n[:, None]).exp_()
        gradient_nv -= tail_nv.add_((target.log_tail_n - tail_norm_n)[:, None]).exp_()
        gradient_nv[tokens, rows] -= log_q.exp()
        return gradient_nv

    return Loss(heres.sum(0) + of_tail_n, gradient)


def top_k_term(k: int) -> Term:
    """Of a live teacher: a second all-gather, because the student's tail is known only when the K tokens are."""
    return Term(partial(candidates, k=k), lambda student, teacher, found, shard: top_k_kl(student, live(teacher, found, k=k), shard))


# A key is an int64 that sorts like (logit, then lower id): the logit's bits, made to sort as an integer, above 2³¹ − 1 − id.
_LOW = 0x7FFFFFFF
NO_KEY = -2139095041 << 32
"""Of a logit of −∞ behind all ids."""


def _keys(logits_nv: Tensor, first_row: int) -> Tensor:
    bits = logits_nv.view(torch.int32)
    sortable = (bits >> 31).bitwise_and_(_LOW).bitwise_xor_(bits)  # of negative numbers the larger magnitude is the smaller one
    ids_v = torch.arange(first_row, first_row + logits_nv.shape[-1], device=logits_nv.device)
    return sortable.long().bitwise_left_shift_(32).bitwise_or_(_LOW - ids_v)


def _logits(keys: Tensor) -> Tensor:
    sortable = (keys >> 32).int()
    return (sortable >> 31).bitwise_and_(_LOW).bitwise_xor_(sortable).view(torch.float32)


def _ids(keys: Tensor) -> Tensor:
    return _LOW - (keys & _LOW)


def _sums_without(masked_nv: Tensor) -> Tensor:
    """shard_sums of logits of which some, or all, are −∞."""
    peak_n = masked_nv.amax(-1).clamp_min(torch.finfo(masked_nv.dtype).min)
    return torch.stack([peak_n, (masked_nv - peak_n[:, None]).exp_().sum(-1)], dim=-1)
