"""A chunk of tokens while its logits exist.

Legend: n tokens of a chunk, v this rank's rows of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from minitron_megatron.training.losses.target import StoredTarget


class Logits(NamedTuple):
    """Raw ones of a chunk, of this rank's real rows, in the weights' type; used up."""

    student_nv: Tensor
    teachers_nv: tuple[Tensor, ...]

    def of(self, tokens: slice) -> Logits:
        return Logits(self.student_nv[tokens], tuple(teacher_nv[tokens] for teacher_nv in self.teachers_nv))


class Chunk(NamedTuple):
    """What belongs to the tokens of a chunk."""

    logits: Logits
    labels_n: Tensor
    token_weights_n: Tensor
    stored: tuple[StoredTarget, ...] = ()
    """What is known of teachers that make no logits."""

    def of(self, tokens: slice) -> Chunk:
        stored = tuple(target.of_tokens(tokens) for target in self.stored)
        return Chunk(self.logits.of(tokens), self.labels_n[tokens], self.token_weights_n[tokens], stored)
