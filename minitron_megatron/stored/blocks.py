"""Files of consecutive samples' records: found by sample id, each with the digest of its text and of its bytes.

A file is: MAGIC, the number of records, for each its place, size, text's digest and bytes' digest, the digest of all that; then the records.
Its name says which samples: train/000000064-000000128.records.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minitron_megatron.errors import ArtifactError

MAGIC = b"minitron teacher outputs 1\n"
ENTRY = struct.Struct("<QQ8s8s")
COUNT = struct.Struct("<Q")
DIGEST_BYTES = 8
SUFFIX = ".records"


class Entry(NamedTuple):
    """Of one record: where it lies, and what text and bytes it is of."""

    place: int
    size: int
    text: bytes
    digest: bytes


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def text_digest(tokens_S: Tensor) -> bytes:
    """Of the tokens that the teacher read, whatever the labels."""
    return digest(tokens_S.to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False).tobytes())


def block_path(folder: Path, ids: range) -> Path:
    return folder / f"{ids.start:09d}-{ids.stop:09d}{SUFFIX}"


def write_block(path: Path, records: Sequence[tuple[bytes, bytes]]) -> None:
    """records: (text's digest, compressed bytes) of consecutive samples. A reader finds the whole file or none."""
    place = len(MAGIC) + COUNT.size + len(records) * ENTRY.size + DIGEST_BYTES
    table = MAGIC + COUNT.pack(len(records))
    for text, data in records:
        table += ENTRY.pack(place, len(data), text, digest(data))
        place += len(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(table + digest(table))
        file.writelines(data for _, data in records)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_table(path: Path) -> list[Entry]:
    """Raises ArtifactError for a file that is missing, of another kind, damaged in its table, or shorter than its table says."""
    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC) + COUNT.size)
            count = COUNT.unpack(head[len(MAGIC) :])[0] if head.startswith(MAGIC) and len(head) == len(MAGIC) + COUNT.size else 0
            size = os.fstat(file.fileno()).st_size
            table = file.read(ENTRY.size * count) if ENTRY.size * count < size else b""
            check = file.read(DIGEST_BYTES)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; {mend(path)}") from None
    entries = [Entry(*fields) for fields in ENTRY.iter_unpack(table)]
    if not entries or digest(head + table) != check or entries[-1].place + entries[-1].size != size:
        raise ArtifactError(f"{path} is damaged; {mend(path)}")
    return entries


def read_record(path: Path, entry: Entry, sample_id: int) -> bytes:
    """Raises ArtifactError for bytes that are not those that were written."""
    with path.open("rb") as file:
        file.seek(entry.place)
        data = file.read(entry.size)
    if digest(data) != entry.digest:
        raise ArtifactError(f"{path} is damaged at sample {sample_id}; {mend(path)}")
    return data


def is_written(path: Path) -> bool:
    try:
        read_table(path)
    except ArtifactError:
        return False
    return True


def is_whole(path: Path) -> bool:
    """Whether every byte is as it was written."""
    try:
        entries = read_table(path)
        for number, entry in enumerate(entries):
            read_record(path, entry, number)
    except ArtifactError:
        return False
    return True


def mend(path: Path) -> str:
    return f"remove {path.name} and make it anew with: minitron teacher-logits RECIPE"
