"""Blocks of documents → token ids, in this process or in several, in order and with bounded memory.

It needs neither torch nor megatron, only a tokenizer.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from minitron_megatron.data.tokenizer import Tokenizer
from minitron_megatron.errors import ProcessDiedError

BLOCK_CHARACTERS = 4_000_000
"""About a million tokens: a second or two of a worker's time, which is what an interruption costs."""


@dataclass(frozen=True)
class Block:
    """Consecutive documents that are encoded, written and resumed as one."""

    number: int
    texts: list[str]

    def name(self, encoder: Encoder) -> str:
        """Number and hash of text and encoder: a block of another text or another vocabulary has another name."""
        content = hashlib.sha256(encoder.digest.encode())
        for text in self.texts:
            encoded = text.encode()
            content.update(len(encoded).to_bytes(8, "little"))
            content.update(encoded)
        return f"{self.number:06d}-{content.hexdigest()[:24]}"


@dataclass(frozen=True)
class EncodedBlock:
    """Token ids of all documents end to end and the length of each; of chats the weight of each token in the loss as well."""

    tokens: NDArray[np.integer]
    lengths: NDArray[np.int32]
    weights: NDArray[np.float32] | None = None


class Encoder(Protocol):
    """What makes ids of texts; it is sent to worker processes."""

    @property
    def dtype(self) -> str:
        """numpy's name for the type of a stored id."""

    @property
    def digest(self) -> str:
        """Names everything but the texts that the ids depend on."""

    def encode(self, texts: list[str]) -> EncodedBlock: ...


@dataclass(frozen=True)
class TextEncoder:
    """Plain documents: their ids, each ended by the end-of-document id."""

    tokenizer: Tokenizer
    dtype: str

    @property
    def digest(self) -> str:
        return f"{self.tokenizer.digest} {self.tokenizer.eod}"

    def encode(self, texts: list[str]) -> EncodedBlock:
        encoded = [np.array([*ids, self.tokenizer.eod], dtype=self.dtype) for ids in self.tokenizer.encode_batch(texts)]
        return EncodedBlock(np.concatenate(encoded), np.array([len(ids) for ids in encoded], dtype=np.int32))


def cut_blocks(texts: Iterable[str], *, characters: int = BLOCK_CHARACTERS) -> Iterator[Block]:
    """Groups documents until a block holds at least so many characters; a document is never divided."""
    number, held, gathered = 0, 0, list[str]()
    for text in texts:
        gathered.append(text)
        held += len(text)
        if held >= characters:
            yield Block(number, gathered)
            number, held, gathered = number + 1, 0, []
    if gathered:
        yield Block(number, gathered)


def encode_blocks(blocks: Iterable[Block], encoder: Encoder, *, workers: int) -> Iterator[tuple[Block, EncodedBlock]]:
    """Each block with its ids, in the order given.

    One worker is this process, with the threads of the tokenizer's library; more are spawned, with one thread each.
    At most 2 × workers blocks are in flight, however long the corpus is.
    Raises DataError when a worker process dies.
    """
    if workers == 1:
        for block in blocks:
            yield block, encoder.encode(block.texts)
    else:
        yield from _encode_in_processes(blocks, encoder, workers)


def _encode_in_processes(blocks: Iterable[Block], encoder: Encoder, workers: int) -> Iterator[tuple[Block, EncodedBlock]]:
    # spawn: forking a process that holds torch's and tokenizers' threads can deadlock
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker)
    in_flight: deque[tuple[Block, Future[EncodedBlock]]] = deque()
    try:
        for block in blocks:
            in_flight.append((block, pool.submit(encoder.encode, block.texts)))
            if len(in_flight) == 2 * workers:
                yield _oldest(in_flight)
        while in_flight:
            yield _oldest(in_flight)
    except BrokenProcessPool:
        raise ProcessDiedError(
            "a tokenizing process died, most often for want of memory; start again with a smaller data.workers: finished blocks are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _oldest(in_flight: deque[tuple[Block, Future[EncodedBlock]]]) -> tuple[Block, EncodedBlock]:
    block, future = in_flight.popleft()
    return block, future.result()


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes already fill the cores
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's worker waits for work for ever when the parent is killed outright, as by the out-of-memory killer."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
