"""How likely a text is to a model, a chunk of logits at a time.

Legend: n tokens, v this rank's rows of the vocabulary, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron_megatron.model.divergence import label_logits, log_normalisers
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.logits import real_logits
from minitron_megatron.parallel.collectives import sum_over

CHUNK_TOKENS = 256


def negative_log_likelihood(model: StageModel, hidden_nD: Tensor, labels_n: Tensor) -> Tensor:
    """Σ over tokens of −ln p(label), a number in fp64, nats; the same on every tensor rank. Logits of CHUNK_TOKENS tokens at a time."""
    group, total = model.layout.groups.tp, torch.zeros((), dtype=torch.float64, device=hidden_nD.device)
    for chunk_nD, some_n in zip(hidden_nD.split(CHUNK_TOKENS), labels_n.split(CHUNK_TOKENS), strict=True):
        logits_nv = real_logits(model, chunk_nD)
        label = sum_over(label_logits(logits_nv, some_n, first_row=model.first_row()), group)
        total += (log_normalisers(logits_nv, group) - label).double().sum()
    return total
