"""Text files → megatron indexed datasets (.bin, .idx), in parallel and resumable.

Documents go through blocks on disk: a finished block is never encoded again, and the parts are merged from blocks.
Import this after `minitron_megatron.platform.activate`.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from minitron_megatron.data.corpus import documents
from minitron_megatron.data.encode import BLOCK_CHARACTERS, Block, EncodedBlock, cut_blocks, encode_blocks
from minitron_megatron.data.progress import TokenProgress
from minitron_megatron.data.tokenizer import Tokenizer
from minitron_megatron.errors import DataError


@dataclass(frozen=True)
class IndexSummary:
    """What one indexed dataset holds; end-of-document ids count as tokens."""

    documents: int
    tokens: int
    sha256: str
    """Of the .bin file."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of one corpus on disk, in order, and how many documents each holds."""

    prefixes: list[Path]
    documents: list[int]

    @property
    def total(self) -> int:
        return sum(self.documents)


def tokenize(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    text_field: str,
    workers: int,
    block_characters: int = BLOCK_CHARACTERS,
) -> Blocks:
    """Encodes every document, each ended by eod, into blocks below `folder`; blocks that are there already are kept.

    The bytes do not depend on `workers` nor on interruptions.
    Raises DataError for what cannot be read and for a corpus without text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    prefixes: list[Path] = []
    with TokenProgress(f"tokenize {folder.name}", sum(path.stat().st_size for path in paths)) as progress:
        blocks = cut_blocks(_read(paths, text_field, progress), characters=block_characters)
        missing = _missing(blocks, tokenizer, folder, prefixes, progress)
        for block, encoded in encode_blocks(missing, tokenizer, dtype=np.dtype(dtype).name, workers=workers):
            _write_block(folder / block.name(tokenizer), encoded, dtype)
            progress.block_written(len(encoded.lengths), len(encoded.tokens))
    if not prefixes:
        raise DataError(f"{', '.join(map(str, paths[:3]))}: no text in {len(paths)} file(s)")
    return Blocks(prefixes, [len(IndexedDataset(str(prefix))) for prefix in prefixes])


def merge(blocks: Blocks, prefix: Path, *, first: int = 0, last: int | None = None) -> IndexSummary:
    """Writes documents first … last − 1 (default: all) as prefix.bin and prefix.idx.

    Whole blocks are copied as bytes; a block that holds a boundary goes document by document.
    """
    stop = blocks.total if last is None else last
    dtype = IndexedDataset(str(blocks.prefixes[0])).index.dtype
    builder = IndexedDatasetBuilder(_bin(prefix), dtype=dtype)
    with _collector_at_rest():
        begin = 0
        for block, count in zip(blocks.prefixes, blocks.documents, strict=True):
            _add(builder, block, range(max(first - begin, 0), min(stop - begin, count)), count)
            begin += count
    builder.finalize(_idx(prefix))
    tokens = sum(int(length) for length in builder.sequence_lengths)
    return IndexSummary(len(builder.sequence_lengths), tokens, file_digest(Path(_bin(prefix))))


def split_and_merge(blocks: Blocks, folder: Path, *, heldout_documents: int) -> dict[str, IndexSummary]:
    """Writes train and heldout, the latter the last documents; raises DataError where nothing is left to train on."""
    training = blocks.total - heldout_documents
    if training < 1:
        raise DataError(
            f"data.heldout_documents={heldout_documents} leaves nothing to train on: data.train holds "
            f"{blocks.total} document(s); hold out at most {blocks.total - 1}, or add text"
        )
    return {
        "train": merge(blocks, folder / "train", last=training),
        "heldout": merge(blocks, folder / "heldout", first=training),
    }


def file_digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def _read(paths: Iterable[Path], text_field: str, progress: TokenProgress) -> Iterator[str]:
    for path in paths:
        yield from documents([path], text_field)
        progress.file_read(path.stat().st_size)


def _missing(blocks: Iterable[Block], tokenizer: Tokenizer, folder: Path, prefixes: list[Path], progress: TokenProgress) -> Iterator[Block]:
    """The blocks that are not on disk yet; the prefix of every block is added to `prefixes`."""
    for block in blocks:
        prefix = folder / block.name(tokenizer)
        prefixes.append(prefix)
        if Path(_idx(prefix)).is_file():
            progress.block_written(len(block.texts), 0)
        else:
            yield block


def _write_block(prefix: Path, encoded: EncodedBlock, dtype: type[np.number]) -> None:
    """The .idx comes last and by a rename: where it is, the block is whole."""
    unfinished = prefix.with_name(f"unfinished-{prefix.name}")
    builder = IndexedDatasetBuilder(_bin(unfinished), dtype=dtype)
    for ids in np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1]):
        builder.add_document(ids, [len(ids)])
    builder.finalize(_idx(unfinished))
    Path(_bin(unfinished)).replace(_bin(prefix))
    Path(_idx(unfinished)).replace(_idx(prefix))


def _add(builder: IndexedDatasetBuilder, block: Path, wanted: range, count: int) -> None:
    if len(wanted) == count:
        builder.add_index(str(block))
    elif wanted:
        source = IndexedDataset(str(block))
        for document in wanted:
            ids = source[document]
            builder.add_document(ids, [len(ids)])


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """megatron's add_index collects all garbage for every block; frozen objects are not walked through each time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _bin(prefix: Path) -> str:
    return f"{prefix}.bin"


def _idx(prefix: Path) -> str:
    return f"{prefix}.idx"
