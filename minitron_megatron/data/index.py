"""Text files → megatron indexed datasets (.bin, .idx), in parallel and resumable.

Documents go through blocks on disk: a finished block is never encoded again, and the parts are merged from blocks. Where an encoder gives
weights, each dataset PREFIX has a second one beside it, PREFIX-weights, with a float32 for each token.
Import this after `minitron_megatron.platform.activate`.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray

from minitron_megatron.data.corpus import documents
from minitron_megatron.data.encode import BLOCK_CHARACTERS, Block, EncodedBlock, Encoder, TextEncoder, cut_blocks, encode_blocks
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

    @staticmethod
    def of(prefixes: list[Path]) -> Blocks:
        return Blocks(prefixes, [len(IndexedDataset(str(prefix))) for prefix in prefixes])

    @property
    def total(self) -> int:
        return sum(self.documents)

    @property
    def have_weights(self) -> bool:
        return is_written(weights_prefix(self.prefixes[0]))

    @property
    def weights(self) -> Blocks:
        """The weights of these blocks' tokens."""
        return Blocks([weights_prefix(prefix) for prefix in self.prefixes], self.documents)


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
    encoder = TextEncoder(tokenizer, token_dtype(tokenizer.vocab_size))
    return encode_files(paths, lambda path: documents([path], text_field), encoder, folder, workers=workers, block_characters=block_characters)


def encode_files(
    paths: Sequence[Path],
    read: Callable[[Path], Iterator[str]],
    encoder: Encoder,
    folder: Path,
    *,
    workers: int,
    block_characters: int = BLOCK_CHARACTERS,
) -> Blocks:
    """What `read` finds in each file, encoded into blocks below `folder`; see tokenize."""
    folder.mkdir(parents=True, exist_ok=True)
    prefixes: list[Path] = []
    with TokenProgress(f"tokenize {folder.name}", sum(path.stat().st_size for path in paths)) as progress:
        blocks = cut_blocks(_read(paths, read, progress), characters=block_characters)
        missing = _missing(blocks, encoder, folder, prefixes, progress)
        for block, encoded in encode_blocks(missing, encoder, workers=workers):
            write_block(folder / block.name(encoder), encoded)
            progress.block_written(len(encoded.lengths), len(encoded.tokens))
    if not prefixes:
        raise DataError(f"{', '.join(map(str, paths[:3]))}: no text in {len(paths)} file(s)")
    return Blocks.of(prefixes)


def token_dtype(vocab_size: int) -> str:
    """numpy's name of the smallest type that holds every id."""
    return np.dtype(DType.optimal_dtype(vocab_size)).name


def weights_prefix(prefix: Path) -> Path:
    """Of the dataset that holds the weights of another one's tokens."""
    return prefix.with_name(f"{prefix.name}-weights")


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


def split_and_merge(
    blocks: Blocks, folder: Path, *, heldout_documents: int, setting: str = "data.heldout_documents", what: str = "document(s)"
) -> dict[str, IndexSummary]:
    """Writes train and heldout, the latter the last documents, with their weights where the blocks have them.

    setting: the recipe's name of heldout_documents. Raises DataError where nothing is left to train on.
    """
    training = blocks.total - heldout_documents
    if training < 1:
        raise DataError(
            f"{setting}={heldout_documents} leaves nothing to train on: {setting.partition('.')[0]}.train holds "
            f"{blocks.total} {what}; hold out at most {blocks.total - 1}, or add text"
        )
    parts = {"train": range(training), "heldout": range(training, blocks.total)}
    if blocks.have_weights:
        for name, part in parts.items():
            merge(blocks.weights, weights_prefix(folder / name), first=part.start, last=part.stop)
    return {name: merge(blocks, folder / name, first=part.start, last=part.stop) for name, part in parts.items()}


def file_digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def _read(paths: Iterable[Path], read: Callable[[Path], Iterator[str]], progress: TokenProgress) -> Iterator[str]:
    for path in paths:
        yield from read(path)
        progress.file_read(path.stat().st_size)


def _missing(blocks: Iterable[Block], encoder: Encoder, folder: Path, prefixes: list[Path], progress: TokenProgress) -> Iterator[Block]:
    """The blocks that are not on disk yet; the prefix of every block is added to `prefixes`."""
    for block in blocks:
        prefix = folder / block.name(encoder)
        prefixes.append(prefix)
        if is_written(prefix):
            progress.block_written(len(block.texts), 0)
        else:
            yield block


def write_block(prefix: Path, encoded: EncodedBlock) -> None:
    """The .idx of the tokens comes last and by a rename: where it is, the block is whole."""
    if encoded.weights is not None:
        _write_dataset(weights_prefix(prefix), encoded.weights, encoded.lengths)
    _write_dataset(prefix, encoded.tokens, encoded.lengths)


def is_written(prefix: Path) -> bool:
    return Path(_idx(prefix)).is_file()


def _write_dataset(prefix: Path, values: NDArray[np.generic], lengths: NDArray[np.int32]) -> None:
    unfinished = prefix.with_name(f"unfinished-{prefix.name}")
    builder = IndexedDatasetBuilder(_bin(unfinished), dtype=values.dtype.type)
    for document in np.split(values, np.cumsum(lengths)[:-1]):
        builder.add_document(document, [len(document)])
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
