"""Packed samples and evaluation windows."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from minitron_megatron.data.samples import evaluation_windows, packed_samples
from minitron_megatron.errors import DataError

LENGTHS = [13, 1, 40, 7, 29, 64, 3, 90, 11, 42]  # 300 tokens
S = 16


def write(prefix: Path, first_token: int, lengths: list[int] = LENGTHS) -> torch.Tensor:
    """Documents whose tokens count upwards, so that each token names its place; returns the stream."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    stream = torch.arange(first_token, first_token + sum(lengths))
    for part in stream.split(lengths):
        builder.add_document(part.numpy(), [len(part)])
    builder.finalize(f"{prefix}.idx")
    return stream


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write(tmp_path / "train", 0)
    write(tmp_path / "heldout", 100_000)
    return tmp_path


def read(corpus: Path, samples: int, *, seed: int = 1, cache: str = "cache", repeat: bool = True) -> list[list[int]]:
    dataset = packed_samples(corpus / "train", samples=samples, sequence_length=S, seed=seed, cache=corpus / cache, repeat=repeat)
    assert len(dataset) == samples
    return [dataset[number].tolist() for number in range(samples)]


def test_calibration_gives_exactly_the_samples_asked_for_and_no_token_twice(corpus: Path) -> None:
    samples = read(corpus, 18, repeat=False)  # 18 × 16 + 1 = 289 of 300 tokens
    assert all(len(sample) == S + 1 for sample in samples)
    inputs = [token for sample in samples for token in sample[:-1]]
    assert len(set(inputs)) == len(inputs) == 18 * S


def test_a_sample_is_a_run_of_whole_documents_end_to_end(corpus: Path) -> None:
    starts = set(np.cumsum([0, *LENGTHS]).tolist())
    ends = {start - 1 for start in starts}
    for sample in read(corpus, 18, repeat=False):
        breaks = [(a, b) for a, b in pairwise(sample) if b != a + 1]
        assert all(a in ends and b in starts for a, b in breaks)


def test_calibration_that_does_not_fit_names_what_was_asked_what_there_is_and_what_fits(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"19 samples of 16 tokens need 305 tokens, there are 300; .* fits is 18"):
        read(corpus, 19, repeat=False)


def test_training_repeats_a_corpus_that_is_shorter_than_what_is_asked(corpus: Path) -> None:
    seen = [token for sample in read(corpus, 100) for token in sample[:-1]]  # 1600 tokens of 300: six epochs
    times = [seen.count(token) for token in range(300)]
    assert sum(times) == len(seen) and min(times) >= 3


def test_the_first_samples_are_the_same_however_many_are_asked_for(corpus: Path) -> None:
    """18 samples are an epoch: within one, at its end, one beyond it, several."""
    longest = read(corpus, 100, cache="long")
    for samples in (5, 18, 19, 36, 50):
        assert read(corpus, samples, cache=f"cache{samples}") == longest[:samples]


def test_every_epoch_reads_the_text_in_an_order_of_its_own(corpus: Path) -> None:
    samples = read(corpus, 54)
    first, second, third = samples[:18], samples[18:36], samples[36:]
    assert len({str(sorted(epoch)) for epoch in (first, second, third)}) == 3
    for epoch in (first, second, third):
        inputs = [token for sample in epoch for token in sample[:-1]]
        assert len(set(inputs)) == len(inputs) == 18 * S  # no token twice before all samples of the epoch are through
    assert second != read(corpus, 18, seed=2, cache="next")  # the second epoch of a seed is not the first of the next seed


def test_the_first_epoch_is_megatrons_own_order_for_the_seed(corpus: Path) -> None:
    """A run of one epoch reads what it read before epochs had orders of their own."""
    index = IndexedDataset(str(corpus / "train"))
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=S,
        tokenizer=SimpleNamespace(unique_identifiers=OrderedDict(), eod=None, vocab_size=None),
        path_to_cache=str(corpus / "reference"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    reference = GPTDataset(index, None, np.arange(len(index), dtype=np.int32), 10, Split.train, config)
    assert [sample[:-1] for sample in read(corpus, 10)] == [reference[number]["tokens"].tolist() for number in range(10)]


def test_training_on_less_than_one_sample_is_refused(corpus: Path) -> None:
    with pytest.raises(DataError, match="1 samples of 300 tokens need 301 tokens, there are 300; shorten sequence_length to at most 299"):
        packed_samples(corpus / "train", samples=5, sequence_length=300, seed=1, cache=corpus / "cache")


def test_the_order_follows_from_seed_and_data_not_from_the_cache_or_the_folder(corpus: Path) -> None:
    first = read(corpus, 50)
    assert read(corpus, 50) == first  # from the cache
    assert read(corpus, 50, cache="other") == first  # built anew
    assert read(corpus, 50, seed=2) != first
    moved = corpus.rename(corpus.with_name(corpus.name + "-moved"))
    before = sorted((moved / "cache").iterdir())
    assert read(moved, 50) == first
    assert sorted((moved / "cache").iterdir()) == before  # and the moved cache was used


def test_other_data_under_the_same_name_gets_another_order(corpus: Path) -> None:
    read(corpus, 10)
    write(corpus / "train", 0, [5, 5, 5, 100, 200])
    assert {token for sample in read(corpus, 15) for token in sample} <= set(range(315))


def test_readers_take_the_order_that_one_process_built(corpus: Path) -> None:
    open_samples = partial(packed_samples, corpus / "train", samples=20, sequence_length=S, seed=3, cache=corpus / "cache")
    with pytest.raises(RuntimeError, match="before the barrier"):
        open_samples(build=False)
    built = open_samples()
    reader = open_samples(build=False)
    assert all(torch.equal(built[number], reader[number]) for number in range(20))
    assert [path.name for path in (corpus / "cache").iterdir() if path.name.startswith("unfinished")] == []


def test_ids_beyond_the_last_sample_are_refused(corpus: Path) -> None:
    dataset = packed_samples(corpus / "train", samples=5, sequence_length=S, seed=1, cache=corpus / "cache")
    with pytest.raises(IndexError):
        dataset[5]  # megatron's dataset holds 18 here


@pytest.mark.parametrize(("tokens", "windows"), [("all", 18), (100, 6), (10_000, 18)])
def test_windows_equal_naive_slicing(corpus: Path, tokens: int, windows: int) -> None:
    stream = torch.arange(100_000, 100_300)
    dataset = evaluation_windows(corpus / "heldout", sequence_length=S, tokens=tokens)
    assert len(dataset) == windows
    for number in range(windows):
        assert torch.equal(dataset[number], stream[number * S : number * S + S + 1])
    with pytest.raises(IndexError):
        dataset[windows]


def test_text_that_fills_one_window_exactly_is_enough_and_one_token_less_is_not(corpus: Path) -> None:
    assert len(evaluation_windows(corpus / "heldout", sequence_length=299, tokens="all")) == 1
    with pytest.raises(DataError, match="300 tokens do not fill a window of 300"):
        evaluation_windows(corpus / "heldout", sequence_length=300, tokens="all")
    with pytest.raises(DataError, match="less than one window"):
        evaluation_windows(corpus / "heldout", sequence_length=S, tokens=S - 1)
    with pytest.raises(DataError, match=r"none\.bin: no such file"):
        evaluation_windows(corpus / "none", sequence_length=S, tokens="all")
