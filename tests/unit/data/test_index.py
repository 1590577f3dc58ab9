"""Text → indexed dataset: the same bytes whatever the workers and the interruptions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from minitron_megatron.data import encode
from minitron_megatron.data.index import Blocks, merge, split_and_merge, tokenize
from minitron_megatron.data.tokenizer import Tokenizer, load_tokenizer
from minitron_megatron.errors import DataError

HELDOUT = 7


@pytest.fixture(scope="module")
def tokenizer(hf_folder: Path) -> Tokenizer:
    return load_tokenizer(hf_folder)


@pytest.fixture
def build(text_files: list[Path], tokenizer: Tokenizer) -> Callable[..., Blocks]:
    def tokenize_small_blocks(folder: Path, workers: int = 1) -> Blocks:
        # 40 documents of ~150 characters in blocks of 1000: about 6 blocks, and the split falls inside one
        return tokenize(text_files, tokenizer, folder / "blocks", text_field="text", workers=workers, block_characters=1000)

    return tokenize_small_blocks


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_parts_hold_the_documents_in_order_each_ended_by_eod(
    build: Callable[..., Blocks], tokenizer: Tokenizer, texts: list[str], tmp_path: Path
) -> None:
    summaries = split_and_merge(build(tmp_path), tmp_path, heldout_documents=HELDOUT)
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    for name, part in {"train": expected[:-HELDOUT], "heldout": expected[-HELDOUT:]}.items():
        stored = IndexedDataset(str(tmp_path / name))
        assert [stored[number].tolist() for number in range(len(stored))] == part
        assert stored.document_indices.tolist() == list(range(len(part) + 1))
        assert stored.index.dtype == np.uint16
        assert (summaries[name].documents, summaries[name].tokens) == (len(part), sum(map(len, part)))


def test_two_workers_write_the_bytes_that_one_does(build: Callable[..., Blocks], tmp_path: Path) -> None:
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        split_and_merge(build(folder, workers), folder, heldout_documents=HELDOUT)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_an_interrupted_build_resumes_to_the_same_bytes_and_encodes_only_what_is_missing(
    build: Callable[..., Blocks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(build(tmp_path / "whole"), tmp_path / "whole" / "all")
    encoded: list[int] = []
    original = encode.TextEncoder.encode

    def count_and_break(encoder: encode.TextEncoder, texts: list[str]) -> encode.EncodedBlock:
        encoded.append(len(texts))
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return original(encoder, texts)

    monkeypatch.setattr(encode.TextEncoder, "encode", count_and_break)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "resumed")
    blocks = build(tmp_path / "resumed")
    assert len(encoded) == len(blocks.prefixes) + 1  # the one that broke, twice
    merge(blocks, tmp_path / "resumed" / "all")
    assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")


def test_a_block_without_its_idx_is_written_again(build: Callable[..., Blocks], tmp_path: Path) -> None:
    blocks = build(tmp_path)
    whole = contents(tmp_path / "blocks")
    Path(f"{blocks.prefixes[2]}.idx").unlink()
    Path(f"{blocks.prefixes[2]}.bin").write_bytes(b"half")
    build(tmp_path)
    assert contents(tmp_path / "blocks") == whole


def test_a_changed_text_is_not_taken_from_an_old_block(
    build: Callable[..., Blocks], text_files: list[Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    first = build(tmp_path)
    text_files[0].write_text(text_files[0].read_text().replace("the", "thy"))  # the same number of characters
    second = build(tmp_path)
    assert first.prefixes[0] != second.prefixes[0] and first.prefixes[1:] == second.prefixes[1:]
    merge(second, tmp_path / "all")
    merged = IndexedDataset(str(tmp_path / "all"))
    assert merged[0].tolist() == [*tokenizer.encode(text_files[0].read_text()), tokenizer.eod]


def test_holding_out_everything_and_an_empty_corpus_are_data_errors(build: Callable[..., Blocks], tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"heldout_documents=40 leaves nothing .* at most 39"):
        split_and_merge(build(tmp_path), tmp_path, heldout_documents=40)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"blank\.txt: no text in 1 file"):
        tokenize([tmp_path / "blank.txt"], tokenizer, tmp_path / "none", text_field="text", workers=1)


def test_a_defect_in_the_text_ends_a_build_in_processes_with_its_place(tokenizer: Tokenizer, tmp_path: Path) -> None:
    broken = tmp_path / "a.jsonl"
    broken.write_text('{"text": "fine"}\n' * 3 + "{\n")
    with pytest.raises(DataError, match=r"a\.jsonl:4"):
        tokenize([broken], tokenizer, tmp_path / "blocks", text_field="text", workers=2, block_characters=1)


def test_many_blocks_keep_only_a_few_in_flight(tokenizer: Tokenizer) -> None:
    taken: list[int] = []

    def watched() -> object:
        for number in range(30):
            taken.append(number)
            yield encode.Block(number, [f"text {number}"])

    for block, _ in encode.encode_blocks(watched(), encode.TextEncoder(tokenizer, "uint16"), workers=2):  # type: ignore[arg-type]
        assert taken[-1] - block.number <= 4
    assert block.number == 29
