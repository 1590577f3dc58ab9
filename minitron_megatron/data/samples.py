"""Indexed dataset → packed samples for training and calibration, and consecutive windows for evaluation.

Legend: S sequence length. A sample and a window are S + 1 tokens: S inputs and, shifted by one, S labels.
Import this after `minitron_megatron.platform.activate`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch import Tensor

from minitron_megatron.errors import DataError


@dataclass(frozen=True)
class SampleDataset:
    """Packed samples 0 … samples − 1, epoch after epoch; the same tokens for an id in whichever process reads it."""

    samples: int
    sequence_length: int
    epoch_samples: int
    _epochs: list[GPTDataset]

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, sample_id: int) -> Tensor:
        """Tokens [S + 1], int64; raises IndexError beyond the last sample."""
        check_id(sample_id, self.samples)
        epoch, number = divmod(sample_id, self.epoch_samples)
        sample = self._epochs[epoch][number]
        return torch.cat((sample["tokens"], sample["labels"][-1:]))


@dataclass(frozen=True)
class WindowDataset:
    """Window i = tokens[i·S : i·S + S + 1] of the whole stream, read through a memory map."""

    prefix: Path
    windows: int
    sequence_length: int

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, window_id: int) -> Tensor:
        """Tokens [S + 1], int64; raises IndexError beyond the last window."""
        check_id(window_id, self.windows)
        begin = window_id * self.sequence_length
        return torch.from_numpy(self._stream[begin : begin + self.sequence_length + 1].astype(np.int64))

    @cached_property
    def _stream(self) -> np.memmap:
        return np.memmap(f"{self.prefix}.bin", dtype=open_index(self.prefix).index.dtype, mode="r")


@dataclass(frozen=True)
class _IndexKey:
    """Stands where GPTDataset wants a tokenizer: it names what the cached order depends on, and that no id pads."""

    unique_identifiers: OrderedDict[str, str]
    vocab_size: None = None
    eod: None = None


def packed_samples(
    prefix: Path, *, samples: int, sequence_length: int, seed: int, cache: Path, repeat: bool = True, build: bool = True
) -> SampleDataset:
    """Samples for calibration and training: documents shuffled by seed, end to end, cut every S tokens, shuffled (GPTDataset).

    Each epoch has an order of its own, so a sample's tokens depend on the data, the seed and sequence_length alone: neither
    on `samples`, nor on the processes that read it. What is left of an epoch behind its last whole sample is not read. With
    repeat=False (calibration) one epoch has to suffice.
    build: True in one process only, rank 0 where there is a process group; the others pass False after the caller's
    barrier.
    Raises DataError for a corpus that is too short; RuntimeError, with build=False, for an order that nobody built.
    """
    index = open_index(prefix)
    epoch_samples = _samples_of_an_epoch(prefix, int(index.sequence_lengths.sum(dtype=np.int64)), samples, sequence_length, repeat)
    lengths_digest = hashlib.sha256(index.sequence_lengths.tobytes()).hexdigest()
    epochs = []
    for number in range(-(-samples // epoch_samples)):
        config = {"random_seed": _seed_of_epoch(seed, number), "sequence_length": sequence_length}
        folder = cache / f"{lengths_digest[:16]}-seed{seed}-length{sequence_length}-epoch{number}"
        if build and not folder.exists():
            with _built_aside(folder) as unfinished:
                _packed(index, lengths_digest, epoch_samples, unfinished, **config)
        if not folder.exists():
            raise RuntimeError(f"{folder}: no sample order; call packed_samples(build=True) in rank 0 before the barrier")
        epochs.append(_packed(index, lengths_digest, epoch_samples, folder, **config))
    return SampleDataset(samples, sequence_length, epoch_samples, epochs)


def evaluation_windows(prefix: Path, *, sequence_length: int, tokens: int | Literal["all"]) -> WindowDataset:
    """Consecutive windows from the start of the stream of documents (each followed by eod), as many as `tokens` fills.

    Each token but the first is predicted once. Raises DataError where neither the text nor `tokens` fills one window.
    """
    stored = total_tokens(prefix)
    available = (stored - 1) // sequence_length
    if available < 1:
        raise DataError(f"{prefix}: {stored} tokens do not fill a window of {sequence_length} + 1; shorten sequence_length or add text")
    asked = available if tokens == "all" else tokens // sequence_length
    if asked < 1:
        raise DataError(f"{prefix}: the {tokens} tokens asked for are less than one window of {sequence_length}; ask for {sequence_length} or more")
    return WindowDataset(prefix, min(asked, available), sequence_length)


def total_tokens(prefix: Path) -> int:
    """Tokens of an indexed dataset, end-of-document ids included."""
    index = open_index(prefix)  # held: when an IndexedDataset goes, its arrays point into unmapped memory
    return int(index.sequence_lengths.sum(dtype=np.int64))


def _packed(index: IndexedDataset, lengths_digest: str, samples: int, folder: Path, *, random_seed: int, sequence_length: int) -> GPTDataset:
    """megatron's dataset with its order in `folder`: built there if missing, else memory-mapped."""
    config = GPTDatasetConfig(
        random_seed=random_seed,
        sequence_length=sequence_length,
        # the order follows from the lengths of the documents alone: keyed by them, a moved folder keeps its cache
        tokenizer=_IndexKey(OrderedDict(lengths=lengths_digest)),
        path_to_cache=str(folder),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return GPTDataset(index, None, np.arange(len(index), dtype=np.int32), samples, Split.train, config)


def open_index(prefix: Path) -> IndexedDataset:
    missing = [name for name in (f"{prefix}.bin", f"{prefix}.idx") if not os.path.isfile(name)]
    if missing:
        raise DataError(f"{missing[0]}: no such file; make it with: minitron data RECIPE")
    return IndexedDataset(str(prefix))


def _seed_of_epoch(seed: int, epoch: int) -> int:
    """The run's own seed for the first epoch; later ones are hashed, so that no epoch of one seed is an epoch of the next."""
    return seed if epoch == 0 else int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _samples_of_an_epoch(prefix: Path, available: int, samples: int, sequence_length: int, repeat: bool) -> int:
    """Whole samples in one pass over the text; raises DataError where that is none, or too few without repetition."""
    largest = (available - 1) // sequence_length
    if available < 1:
        raise DataError(f"{prefix}: no tokens")
    if largest < (1 if repeat else samples):
        wanted = 1 if repeat else samples
        mend = f"the most that fits is {largest}" if largest else f"shorten sequence_length to at most {available - 1}"
        raise DataError(
            f"{prefix}: {wanted} samples of {sequence_length} tokens need {wanted * sequence_length + 1} tokens, "
            f"there are {available}; {mend}, or add text"
        )
    return largest


@contextmanager
def _built_aside(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` by one rename: no reader and no later start meets half an order."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        raise RuntimeError("packed_samples(build=True) outside rank 0: megatron writes the order in rank 0 only")
    unfinished = folder.with_name(f"unfinished-{folder.name}-{os.getpid()}")
    try:
        yield unfinished
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # else another run was first, with the same order
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_id(number: int, count: int) -> None:
    if not 0 <= number < count:
        raise IndexError(f"sample {number} of {count}")
