"""What the student of a micro-batch is held against on this rank.

Legend: N tokens of a micro-batch, v this rank's rows of the vocabulary, E a teacher's hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from minitron_megatron.data.batches import Batch
from minitron_megatron.model.divergence import Softmax
from minitron_megatron.training.losses.terms import Loss, Shard


@dataclass(frozen=True)
class TokenLabels:
    """The text itself."""

    labels_N: Tensor
    token_weights_N: Tensor
    """fp32; they go into the sum, never into the token count."""


@dataclass(frozen=True)
class WeightedTarget:
    """One teacher: its last hidden states and its output weight.

    With several the loss is Σ weight · loss(teacher, student) (Fukuda et al., Interspeech 2017). For forward KL its gradient is that of the KL
    to the weighted mean of the teachers' distributions, the ensemble of arXiv 1503.02531, section 3; for other losses it is not.
    """

    hidden_NE: Tensor
    weight_vE: Tensor
    weight: float = 1.0


class StoredTarget(Protocol):
    """A teacher of whom a file holds something of each token: no logits of it are made."""

    @property
    def name(self) -> str:
        """Of its loss, as in LossSettings.objective."""

    @property
    def weight(self) -> float: ...

    def of_tokens(self, tokens: slice) -> StoredTarget: ...

    def loss(self, student: Softmax, shard: Shard) -> Loss:
        """Of a chunk; the student's logits are at the stored temperature."""


Target = WeightedTarget | StoredTarget


def token_labels(batch: Batch) -> TokenLabels:
    """In the order of hidden states [S, B, D] with their first two dimensions made one."""
    return TokenLabels(batch.labels_BS.t().flatten(), batch.loss_mask_BS.t().flatten())
