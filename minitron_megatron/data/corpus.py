"""Documents out of .txt, .jsonl(.gz, .zst) and .parquet files, one at a time."""

from __future__ import annotations

import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from minitron_megatron.errors import DataError


def expand(globs: Sequence[str]) -> list[Path]:
    """Files of each glob in turn, sorted within it; a file that several globs name comes once, at its first place.

    Once only, because a document that came again could be held out and trained on at the same time.
    Raises DataError for a glob that matches no file and for a file of an unknown kind.
    """
    found: dict[Path, None] = {}
    for pattern in globs:
        files = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
        if not files:
            raise DataError(f"{pattern}: no file matches; relative globs start at the working directory, {Path.cwd()}")
        found.update(dict.fromkeys(files))
    for path in found:
        _reader(path)
    return list(found)


def documents(paths: Sequence[Path], text_field: str) -> Iterator[str]:
    """Every document that is not blank, in the order of the files.

    One .txt file, one .jsonl line or one .parquet row is a document; text_field names the JSON field or the column.
    Memory: one .txt file, one line or 1024 rows. Raises DataError with file and line for what cannot be read.
    """
    readers = [(_reader(path), path) for path in paths]
    for read, path in readers:
        for text in read(path, text_field):
            if text and not text.isspace():
                yield text


def _reader(path: Path) -> Callable[[Path, str], Iterator[str]]:
    readers = {
        ".txt": _text,
        ".jsonl": _json_lines,
        ".jsonl.gz": _json_lines,
        ".jsonl.zst": _json_lines,
        ".parquet": _parquet,
    }
    for ending, read in readers.items():
        if path.name.endswith(ending):
            return read
    raise DataError(f"{path}: unknown kind of file; data is read from .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet")


def _text(path: Path, text_field: str) -> Iterator[str]:
    try:
        yield path.read_bytes().decode("utf-8-sig")  # bytes: line ends stay as they are, as in the other formats
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; convert the file with `iconv -t utf-8`") from None


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    for where, record in json_lines(path):
        yield _as_text(field_of(record, text_field, where, "data.text_field"), text_field, where)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """FILE:LINE and value of each line that is not blank. Raises DataError with file and line for what cannot be read."""
    number = 0
    try:
        with _open_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    yield f"{path}:{number}", _parsed(line, f"{path}:{number}")
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number + 1}: not UTF-8 near this line") from None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path}:{number + 1}: cannot be read further: {error}") from None


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None


def field_of(record: Any, name: str, where: str, setting: str) -> Any:
    """record[name]; raises DataError that names the recipe's setting for it."""
    if not isinstance(record, dict) or name not in record:
        known = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: no field '{name}' (found: {known}); name the right one in {setting}")
    return record[name]


def _as_text(value: object, text_field: str, where: str) -> str:
    """Text as it is, without halves of surrogate pairs; JSON null counts as an empty document."""
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"{where}: '{text_field}' holds {kind}, not text; name the text's in data.text_field")
    return whole_characters(value)


def whole_characters(text: str) -> str:
    """Halves of surrogate pairs, which JSON can hold and a tokenizer cannot, replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@contextmanager
def _open_lines(path: Path) -> Iterator[IO[str]]:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8-sig") as lines:
            yield lines
    elif path.suffix == ".zst":
        with path.open("rb") as packed:
            yield _unpack_zst(packed)
    else:
        with path.open(encoding="utf-8-sig") as lines:
            yield lines


def _unpack_zst(packed: IO[bytes]) -> IO[str]:
    # across frames: pzstd and `cat a.zst b.zst` write several, and the default stops silently after the first
    # window size: what `zstd --long=31` writes
    unpacked = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(packed, read_across_frames=True)
    return io.TextIOWrapper(unpacked, encoding="utf-8-sig")


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = table.schema_arrow.names
        if text_field not in columns:
            known = ", ".join(columns)
            raise DataError(f"{path}: no column '{text_field}' (found: {known}); name the text's in data.text_field")
        for batch in table.iter_batches(columns=[text_field], batch_size=1024):
            for value in batch.column(0):
                yield _as_text(value.as_py(), text_field, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {' '.join(str(error).split())[:200]}") from None
