"""Datasets whose tokens have weights in the loss: packed texts with answers in them, and documents without the guess at the next one.

Legend: S sequence length. A sample is S + 1 tokens: S inputs and, shifted by one, S labels.
Import this after `minitron_megatron.platform.activate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray
from torch import Tensor

from minitron_megatron.data.batches import TokenDataset, label_weights
from minitron_megatron.data.index import weights_prefix
from minitron_megatron.data.packing import Packing, Rule, pack
from minitron_megatron.data.samples import check_id, open_index
from minitron_megatron.errors import DataError

PADDING = 0
"""Token id behind the last text of a sample; no label there counts."""


@dataclass(frozen=True)
class PackedTexts:
    """Which texts of a dataset make up its samples of at most S + 1 tokens, and what is not in them."""

    packing: Packing
    texts: int
    cut: int
    """Longer than S + 1 tokens; the rest of them is left out."""
    without_answer: int
    """Texts of whose first S + 1 tokens none counts: in no sample."""
    answer_tokens: int
    """Tokens that count, over all samples."""

    def figures(self) -> dict[str, int]:
        return {
            "samples": len(self.packing),
            "texts": self.texts,
            "cut": self.cut,
            "without_answer": self.without_answer,
            "answer_tokens": self.answer_tokens,
        }


@dataclass(frozen=True)
class AnswerDataset:
    """Samples 0 … samples − 1, each epoch in an order of its own; the same for an id in whichever process reads it."""

    prefix: Path
    packed: PackedTexts
    samples: int
    sequence_length: int
    seed: int | None
    """None: in the order of the packing, for validation."""

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, sample_id: int) -> Tensor:
        """Tokens [S + 1], int64; raises IndexError beyond the last sample."""
        return torch.from_numpy(self._joined(sample_id, self._tokens, PADDING, np.int64))

    def weights(self, sample_id: int) -> Tensor:
        """[S + 1] fp32: how much each token of the sample counts as a label; 0 for the first one of each text."""
        weights = self._joined(sample_id, self._weights, 0, np.float32)
        lengths = [min(self._tokens.get_length(text), len(weights)) for text in self._texts(sample_id)]
        weights[np.cumsum([0, *lengths[:-1]])] = 0
        return torch.from_numpy(weights)

    def _joined(self, sample_id: int, index: _Index, padding: int, dtype: Any) -> NDArray[Any]:
        whole = np.full(self.sequence_length + 1, padding, dtype=dtype)
        place = 0
        for text in self._texts(sample_id):
            values = index.get(text)[: len(whole)]
            whole[place : place + len(values)] = values
            place += len(values)
        return whole

    def _texts(self, sample_id: int) -> list[int]:
        check_id(sample_id, self.samples)
        epoch, number = divmod(sample_id, len(self.packed.packing))
        place = number if self.seed is None else int(_order(len(self.packed.packing), self.seed, epoch)[number])
        texts: list[int] = self.packed.packing.texts_of(place).tolist()
        return texts

    @cached_property
    def _tokens(self) -> _Index:
        return _Index(self.prefix)

    @cached_property
    def _weights(self) -> _Index:
        return _Index(weights_prefix(self.prefix))


class _Index:
    """An indexed dataset of one sequence a document."""

    def __init__(self, prefix: Path) -> None:
        self._index: IndexedDataset = open_index(prefix)

    def get(self, text: int) -> NDArray[Any]:
        values: NDArray[Any] = self._index[text]
        return values

    def get_length(self, text: int) -> int:
        return int(self._index.sequence_lengths[text])


@lru_cache(maxsize=4)
def _order(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(samples)


def answer_samples(prefix: Path, *, samples: int, sequence_length: int, seed: int, packing: Rule = "best_fit") -> AnswerDataset:
    """Samples of whole texts for training, epoch after epoch, packed anew from the texts' lengths alone.

    Raises DataError where no text has an answer within the sequence length.
    """
    return AnswerDataset(prefix, pack_answers(prefix, sequence_length=sequence_length, packing=packing), samples, sequence_length, seed)


def heldout_answers(prefix: Path, *, sequence_length: int, at_most: int) -> AnswerDataset:
    """The first samples of texts in their order, for validation; raises DataError as answer_samples does."""
    packed = pack_answers(prefix, sequence_length=sequence_length, packing="sequential")
    return AnswerDataset(prefix, packed, min(at_most, len(packed.packing)), sequence_length, None)


def pack_answers(prefix: Path, *, sequence_length: int, packing: Rule) -> PackedTexts:
    """The samples that the texts of a dataset with weights make up; raises DataError where there is none."""
    index = open_index(prefix)  # held: when an IndexedDataset goes, its arrays point into unmapped memory
    lengths = index.sequence_lengths.astype(np.int64)
    counted = _counted_tokens(weights_prefix(prefix), lengths, sequence_length + 1)
    answered = np.flatnonzero(counted)
    if not len(answered):
        raise DataError(
            f"{prefix}: none of {len(lengths)} texts has an answer within {sequence_length} tokens; raise the sequence length, or add text"
        )
    packing_of_all = pack(answered, lengths[answered], sequence_length + 1, packing)
    cut = int((lengths > sequence_length + 1).sum())
    return PackedTexts(packing_of_all, len(lengths), cut, len(lengths) - len(answered), int(counted.sum()))


def _counted_tokens(weights: Path, lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """[texts] how many of a text's tokens 1 … capacity − 1 count; the first one is no label of its own text."""
    open_index(weights)
    counts = np.append(np.memmap(f"{weights}.bin", dtype=np.float32, mode="r") > 0, False)
    kept, begins = np.minimum(lengths, capacity), np.cumsum(lengths) - lengths
    borders = np.stack([begins + 1, begins + np.maximum(kept, 1)], axis=1).ravel()
    found = np.add.reduceat(counts, np.minimum(borders, len(counts) - 1), dtype=np.int64)[::2]
    found[kept <= 1] = 0  # reduceat gives the one value at an empty range's place
    return found


@dataclass(frozen=True)
class WithoutBoundaries:
    """The same samples; a label behind an end-of-document id, the first token of an unrelated text, does not count."""

    dataset: TokenDataset
    eod: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample_id: int) -> Tensor:
        return self.dataset[sample_id]

    def weights(self, sample_id: int) -> Tensor:
        tokens = self.dataset[sample_id]
        weights = label_weights(self.dataset, sample_id, tokens).clone()
        weights[1:][tokens[:-1] == self.eod] = 0
        return weights
