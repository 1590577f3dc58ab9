"""Logits → the next token: the most likely one, or one drawn from the most likely ones.

Legend: n texts, V vocabulary, v this rank's rows of it with those that pad it, r tensor ranks, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minitron_megatron.model.gpt import StageModel
from minitron_megatron.parallel.collectives import gather_first


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the most likely token, the lower id where two are equal. top_p: nucleus sampling (Holtzman et al., arXiv 1904.09751)."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def draws(self, sample_ids: Sequence[int], count: int) -> Tensor:
        """[texts, count] fp64 in [0, 1): of a text's own id and the seed alone, so that it is the same text in whichever process."""
        return torch.from_numpy(np.stack([np.random.default_rng([self.seed, sample_id]).random(count) for sample_id in sample_ids]))


def whole_logits(model: StageModel, hidden_nD: Tensor) -> Tensor:
    """[n, V] fp32 on every tensor rank of the last stage; a collective among them, for few tokens."""
    weight = model.output_weight()
    if weight is None:
        raise RuntimeError("logits are made on the last stage only")
    shards_rnv = gather_first((hidden_nD @ weight.t()).float(), model.layout.groups.tp)
    return shards_rnv.transpose(0, 1).flatten(1)[:, : model.architecture.vocab]  # without the rows that pad it


def sampled_tokens(logits_nV: Tensor, draws_n: Tensor, sampling: Sampling) -> Tensor:
    """[n] token ids, drawn from softmax(logits / temperature) among the most likely tokens that together reach top_p.

    A draw is a place on the line of cumulated probabilities, most likely tokens first (the lower id where two are equal); fp64, so that
    rounding of another layout moves hardly any border.
    """
    ordered, ids = (logits_nV.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    upto = ordered.softmax(-1).cumsum(-1)
    reached = (upto < sampling.top_p).sum(-1, keepdim=True).clamp_max(upto.shape[-1] - 1)  # the first place that reaches top_p
    whole = upto.gather(-1, reached)
    place = torch.minimum((upto <= draws_n[:, None] * whole).sum(-1, keepdim=True), reached)
    return ids.gather(-1, place)[:, 0]
