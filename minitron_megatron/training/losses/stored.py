"""Forward KL to a teacher whose outputs were stored: its K likeliest tokens and a tail, or a sample of its distribution.

Legend: n tokens of a chunk, N of a micro-batch, v this rank's rows of the vocabulary, K classes of one token, U different tokens drawn for it.
q the teacher, p the student, both at the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitron_megatron.model.divergence import Softmax
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.training.losses.settings import SAMPLED, TOP_K
from minitron_megatron.training.losses.terms import Loss, Shard
from minitron_megatron.training.losses.top_k import TopK, top_k_kl


@dataclass(frozen=True)
class StoredTopK:
    """A StoredTarget; compact as it came from the file."""

    ids_NK: Tensor
    log_probs_NK: Tensor
    log_tail_N: Tensor
    weight: float = 1.0
    name: str = TOP_K

    def of_tokens(self, tokens: slice) -> StoredTopK:
        return replace(self, ids_NK=self.ids_NK[tokens], log_probs_NK=self.log_probs_NK[tokens], log_tail_N=self.log_tail_N[tokens])

    def loss(self, student: Softmax, shard: Shard) -> Loss:
        return top_k_kl(student, self.classes(), shard)

    def classes(self) -> TopK:
        """Rounded logarithms of K + 1 probabilities, made to sum to 1 again: each is off by its own rounding and at most their mean."""
        rounded = torch.cat([self.log_probs_NK.float(), self.log_tail_N.float()[:, None]], dim=-1)
        exact = rounded - rounded.logsumexp(-1, keepdim=True)
        return TopK(self.ids_NK.long(), exact[:, :-1], exact[:, -1])


@dataclass(frozen=True)
class StoredSample:
    """A StoredTarget: tokens drawn from q with replacement, each with the share w of the draws that it was (arXiv 2503.16870: importance weights
    q / q of draws from q itself). E[w_i] = q_i and Σ w = 1, so loss and gradient are right in expectation for every student."""

    ids_NU: Tensor
    shares_NU: Tensor
    """fp32; 0 where a token has fewer."""
    entropy_N: Tensor
    """−Σ q ln q over the whole vocabulary, fp32."""
    weight: float = 1.0
    name: str = SAMPLED

    def of_tokens(self, tokens: slice) -> StoredSample:
        return replace(self, ids_NU=self.ids_NU[tokens], shares_NU=self.shares_NU[tokens], entropy_N=self.entropy_N[tokens])

    def loss(self, student: Softmax, shard: Shard) -> Loss:
        """−Σ w ln p − H(q), an unbiased estimate of KL(q ‖ p) in nats, which may be below 0; gradient p − w. One all-reduce of a number a token."""
        rows_nU = self.ids_NU.long() - shard.first_row
        tokens, classes = ((rows_nU >= 0) & (rows_nU < student.logits_nv.shape[-1]) & (self.shares_NU > 0)).nonzero(as_tuple=True)
        rows, shares = rows_nU[tokens, classes], self.shares_NU[tokens, classes]
        log_p = student.logits_nv[tokens, rows] - student.log_norm_n[tokens]
        here_n = torch.zeros_like(student.log_norm_n).index_add_(0, tokens, shares * log_p)

        def gradient() -> Tensor:
            gradient_nv = (student.logits_nv - student.log_norm_n[:, None]).exp_()
            gradient_nv[tokens, rows] -= shares  # a token is among the drawn ones once
            return gradient_nv

        return Loss(-sum_over(here_n, shard.group) - self.entropy_N, gradient)
