"""Texts in samples: each once, none divided, and what counts as a label."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minitron_megatron.artifact import Artifact, write_json
from minitron_megatron.data.answers import AnswerDataset, WithoutBoundaries, answer_samples, heldout_answers, pack_answers
from minitron_megatron.data.batches import collate
from minitron_megatron.data.encode import EncodedBlock
from minitron_megatron.data.index import write_block
from minitron_megatron.data.packing import pack
from minitron_megatron.data.shared import training_text
from minitron_megatron.parallel.world import World
from minitron_megatron.platform import activate

RULES = ("best_fit", "sequential")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_packing_covers_every_text_once_and_no_sample_overflows(rule: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 40, 300)
    names = random.permutation(1000)[:300]
    packing = pack(names, lengths, 33, rule)  # type: ignore[arg-type]
    assert sorted(packing.texts.tolist()) == sorted(names.tolist())
    length_of = dict(zip(names.tolist(), np.minimum(lengths, 33).tolist(), strict=True))
    fill = [sum(length_of[text] for text in packing.texts_of(sample).tolist()) for sample in range(len(packing))]
    assert min(fill) > 0 and max(fill) <= 33 and sum(fill) == sum(length_of.values())


def test_best_fit_is_best_fit_decreasing() -> None:
    """Against the definition, tried sample by sample; and it leaves less empty than packing in order."""
    lengths = np.random.default_rng(7).integers(1, 64, 200)
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(64 - length)
    found, in_order = (pack(np.arange(200), lengths, 64, rule) for rule in RULES)  # type: ignore[arg-type]
    left = [64 - int(lengths[found.texts_of(sample)].sum()) for sample in range(len(found))]
    assert sorted(left) == sorted(rooms)
    assert len(found) < len(in_order)


def test_sequential_keeps_the_order() -> None:
    packing = pack(np.arange(5), np.array([3, 4, 2, 9, 1]), 7, "sequential")
    assert [packing.texts_of(sample).tolist() for sample in range(len(packing))] == [[0, 1], [2], [3], [4]]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Text n is [10n, 10n + 1, …]; its first half does not count, the others n + 1 each; the last has no answer within 7 tokens."""
    lengths = [4, 6, 3, 8, 20]
    tokens = np.concatenate([np.arange(length) + 10 * text for text, length in enumerate(lengths)]).astype(np.uint16)
    weights = [np.where(np.arange(length) < (length // 2 if text < 4 else 10), 0, text + 1) for text, length in enumerate(lengths)]
    write_block(tmp_path / "train", EncodedBlock(tokens, np.array(lengths, dtype=np.int32), np.concatenate(weights).astype(np.float32)))
    return tmp_path / "train"


def test_weights_are_those_of_the_labels_and_padding_counts_for_nothing(texts: Path) -> None:
    batch = collate(heldout_answers(texts, sequence_length=7, at_most=9), [0, 1, 2])
    assert batch.tokens_BS.tolist() == [[0, 1, 2, 3, 0, 0, 0], [10, 11, 12, 13, 14, 15, 0], [20, 21, 22, 0, 0, 0, 0]]
    assert batch.labels_BS.tolist() == [[1, 2, 3, 0, 0, 0, 0], [11, 12, 13, 14, 15, 0, 0], [21, 22, 0, 0, 0, 0, 0]]
    assert batch.loss_mask_BS.tolist() == [[0, 1, 1, 0, 0, 0, 0], [0, 0, 2, 2, 2, 0, 0], [3, 3, 0, 0, 0, 0, 0]]


def test_the_first_token_of_a_text_is_no_label_even_where_it_has_a_weight(tmp_path: Path) -> None:
    """It is a guess at an unrelated text, from the end of the one before."""
    ones = np.ones(6, dtype=np.float32)
    write_block(tmp_path / "train", EncodedBlock(np.arange(1, 7, dtype=np.uint16), np.array([2, 3, 1], dtype=np.int32), ones))
    dataset = heldout_answers(tmp_path / "train", sequence_length=6, at_most=1)
    batch = collate(dataset, [0])
    assert batch.tokens_BS.tolist() == [[1, 2, 3, 4, 5, 0]]
    assert batch.loss_mask_BS.tolist() == [[1, 0, 1, 1, 0, 0]]
    assert dataset.packed.without_answer == 1 and dataset.packed.answer_tokens == 3


def test_long_texts_are_cut_and_those_without_an_answer_left_out_and_both_are_counted(texts: Path) -> None:
    packed = pack_answers(texts, sequence_length=6, packing="sequential")
    assert packed.figures() == {"samples": 4, "texts": 5, "cut": 2, "without_answer": 1, "answer_tokens": 2 + 3 + 2 + 3}
    dataset = answer_samples(texts, samples=4, sequence_length=6, seed=0, packing="sequential")
    counted = sum(int((collate(dataset, [n]).loss_mask_BS > 0).sum()) for n in range(4))
    assert counted == packed.answer_tokens


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own(texts: Path) -> None:
    dataset = answer_samples(texts, samples=12, sequence_length=9, seed=5, packing="sequential")
    per_epoch = len(dataset.packed.packing)
    epochs = [[tuple(dataset[n].tolist()) for n in range(start, start + per_epoch)] for start in range(0, 12 - per_epoch + 1, per_epoch)]
    assert per_epoch == 3 and len(epochs) == 4
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    again = answer_samples(texts, samples=3, sequence_length=9, seed=5, packing="sequential")
    assert [tuple(again[n].tolist()) for n in range(3)] == epochs[0]  # whatever the number of samples that is asked for
    with pytest.raises(IndexError):
        dataset[12]


def test_labels_take_the_place_of_the_training_text_and_boundaries_are_masked_in_either(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    for file in tmp_path.glob("train*"):
        shutil.copy(file, tmp_path / "labels" / file.name)
    write_json(tmp_path / "result.json", {"eod": 21})
    data, labels = Artifact(tmp_path, {"id": "d"}), Artifact(tmp_path / "labels", {"id": "l"})
    asked: dict[str, Any] = {"samples": 2, "sequence_length": 7, "seed": 1, "cache": tmp_path / "cache"}
    world = World(activate("cpu"))
    plain = training_text(world, {"data": data}, **asked)
    assert collate(plain, [0, 1]).loss_mask_BS.min() == 1
    masked = collate(training_text(world, {"data": data}, **asked, mask_boundaries=True), [0, 1])
    assert torch.equal(masked.loss_mask_BS == 0, masked.tokens_BS == 21) and (masked.tokens_BS == 21).any()
    written = training_text(world, {"data": data, "labels": labels}, **asked)
    assert isinstance(written, AnswerDataset)
    whole = collate(written, [0, 1]).loss_mask_BS
    assert torch.equal(whole, collate(answer_samples(texts, samples=2, sequence_length=7, seed=1), [0, 1]).loss_mask_BS)


class Plain:
    def __len__(self) -> int:
        return 1

    def __getitem__(self, sample_id: int) -> Tensor:
        return torch.tensor([5, 9, 0, 7, 0, 0, 8, 0])


def test_a_label_behind_an_end_of_document_counts_only_where_it_is_asked_to() -> None:
    assert collate(Plain(), [0]).loss_mask_BS.tolist() == [[1.0] * 7]
    masked = collate(WithoutBoundaries(Plain(), eod=0), [0])
    assert masked.labels_BS.tolist() == [[9, 0, 7, 0, 0, 8, 0]]
    assert masked.loss_mask_BS.tolist() == [[1, 1, 0, 1, 0, 0, 1]]  # the ends themselves are learned
