"""Records on disk: nothing is lost but what the type of the log-probabilities rounds, and damage is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minitron_megatron.errors import ArtifactError
from minitron_megatron.stored.blocks import block_path, is_whole, is_written, read_record, read_table, text_digest, write_block
from minitron_megatron.stored.records import OutputFormat, SampleRecord, TopKRecord, bytes_for

PLACES, K, DRAWS = 7, 5, 300
BITS = {"float16": 11, "bfloat16": 8, "float32": 24}


def a_format(kind: str = "top_k", *, vocab: int = 131, log_probs: str = "float16", classes: int = K) -> OutputFormat:
    return OutputFormat(kind, classes, vocab, PLACES, 1.0, log_probs, 3)


def top_k_record(vocab: int) -> TopKRecord:
    """The highest id is among them, and tails down to nothing."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(min(vocab, 5000), generator=generator)[:K] for _ in range(PLACES)])
    ids[2, 3] = vocab - 1
    log_probs = -20 * torch.rand(PLACES, K, generator=generator)
    return TopKRecord(ids.int(), log_probs, torch.tensor([-1e-7, -0.3, -2.0, -9.0, -40.0, -torch.inf, -1e-3]))


@pytest.mark.parametrize(("vocab", "size"), [(131, 1), (256, 1), (257, 2), (49_152, 2), (128_256, 3), (2**24 + 1, 4)])
def test_ids_of_any_vocabulary_take_as_few_bytes_as_it_needs_and_come_back(vocab: int, size: int) -> None:
    form, record = a_format(vocab=vocab), top_k_record(vocab)
    assert form.id_bytes == size == bytes_for(vocab - 1)
    found = form.decode(form.encode(record))
    assert isinstance(found, TopKRecord) and torch.equal(found.ids_SK, record.ids_SK)


@pytest.mark.parametrize("log_probs", BITS)
def test_log_probabilities_are_off_by_their_types_half_bit_at_most(log_probs: str) -> None:
    form, record = a_format(log_probs=log_probs), top_k_record(131)
    found = form.decode(form.encode(record))
    assert isinstance(found, TopKRecord)
    for back, given in ((found.log_probs_SK, record.log_probs_SK), (found.log_tail_S, record.log_tail_S)):
        finite = given.isfinite()
        assert torch.equal(back.float()[~finite], given[~finite])
        # half of the last bit; below 2^-14 float16 has fewer bits, in steps of 2^-24
        bound = 2.0 ** -BITS[log_probs] * given[finite].abs() + 2.0**-25
        assert bool(((back.float()[finite] - given[finite]).abs() <= bound).all())


@pytest.mark.parametrize("draws", [255, 256, DRAWS])
def test_a_sample_comes_back_with_its_counts(draws: int) -> None:
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(1, 4, (PLACES, 6), generator=generator, dtype=torch.int32)
    counts[0, 1:] = 0  # one token took all draws
    counts[3, 4:] = 0
    counts[0, 0] = draws
    ids = torch.randint(131, (PLACES, 6), generator=generator, dtype=torch.int32) * (counts > 0)
    record = SampleRecord(ids, counts, torch.rand(PLACES, generator=generator))
    form = a_format("sample", classes=draws)
    found = form.decode(form.encode(record))
    assert isinstance(found, SampleRecord)
    assert all(torch.equal(back, given) for back, given in zip(found, record, strict=True))


@pytest.fixture
def block(tmp_path: Path) -> Path:
    path = block_path(tmp_path / "train", range(3, 6))
    write_block(path, [(text_digest(torch.arange(n, n + 9)), bytes(range(n, n + 40))) for n in (3, 4, 5)])
    return path


def test_a_block_gives_each_samples_bytes_and_text(block: Path) -> None:
    entries = read_table(block)
    assert [read_record(block, entry, 0) for entry in entries] == [bytes(range(n, n + 40)) for n in (3, 4, 5)]
    assert [entry.text for entry in entries] == [text_digest(torch.arange(n, n + 9)) for n in (3, 4, 5)]
    assert is_written(block) and is_whole(block) and block.name == "000000003-000000006.records"


def test_every_flipped_byte_and_every_cut_is_found(block: Path) -> None:
    whole = block.read_bytes()
    first_record = read_table(block)[0].place
    for place in range(len(whole)):
        block.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert not is_whole(block), place
        assert is_written(block) == (place >= first_record)  # what a resume looks at; records are checked as they are read
    for size in (0, 10, first_record - 3, first_record + 5, len(whole) - 1):
        block.write_bytes(whole[:size])
        assert not is_written(block), size
    block.write_bytes(whole[:first_record] + b"x" + whole[first_record + 1 :])
    with pytest.raises(
        ArtifactError, match=r"000000003-000000006.records is damaged at sample 3; remove .* make it anew with: minitron teacher-logits"
    ):
        read_record(block, read_table(block)[0], 3)
    with pytest.raises(ArtifactError, match="no such file"):
        read_table(block.with_name("x.records"))
