"""Corpora: every format gives the same documents, every defect names its place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from minitron_megatron.data.corpus import documents, expand
from minitron_megatron.errors import DataError

TEXTS = ["first\r\nline", "   \n", "zweite Zeile – ü", "", "third\u2028one"]
KEPT = [TEXTS[0], TEXTS[2], TEXTS[4]]
LINES = "".join(json.dumps({"id": number, "body": text}) + "\n" for number, text in enumerate(TEXTS)).encode()


def write_parquet(path: Path) -> None:
    table = pyarrow.table({"id": list(range(len(TEXTS) + 1)), "body": [*TEXTS, None]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def write_two_frames(path: Path) -> None:
    middle = LINES.index(b"\n") + 1
    path.write_bytes(zstandard.compress(LINES[:middle]) + zstandard.compress(LINES[middle:]))


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(LINES + b"\n"),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "a.jsonl.zst": write_two_frames,
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert list(documents([tmp_path / name], "body")) == KEPT


def test_one_txt_file_is_one_document_and_blank_ones_are_skipped(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    assert list(documents(expand([f"{tmp_path}/*.txt"]), "body")) == KEPT


def test_files_are_sorted_within_a_glob_globs_keep_their_order_and_a_file_comes_once(tmp_path: Path) -> None:
    for name in ("b1", "b0", "a1", "a0"):
        (tmp_path / f"{name}.txt").write_text(name)
    found = expand([f"{tmp_path}/b*.txt", f"{tmp_path}/*.txt"])
    assert [path.stem for path in found] == ["b0", "b1", "a0", "a1"]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y"}\n')
    assert list(documents([tmp_path / "a.jsonl"], "text")) == ["x\ufffdy"]


DEFECTS = {
    "line": ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: broken JSON"),
    "field": ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', r"a\.jsonl:3: no field 'text' \(found: body\)"),
    "no object": ("a.jsonl", b"[1]\n", r"a\.jsonl:1: no field 'text' \(found: list\)"),
    "type": ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: 'text' holds int"),
    "encoding": ("a.txt", b"abc\xff", r"a\.txt: byte 3 is not UTF-8"),
    "encoding of a line": ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
    "no gzip": ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz:1: cannot be read further"),
    "half a gzip": ("a.jsonl.gz", gzip.compress(LINES)[:-20], r"a\.jsonl\.gz:\d: (cannot be read further|no field)"),
    "no zst": ("a.jsonl.zst", b"plain", r"a\.jsonl\.zst:1: cannot be read further"),
    "no parquet": ("a.parquet", b"plain", r"a\.parquet: cannot be read as parquet"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_a_data_error_that_names_its_place(defect: str, tmp_path: Path) -> None:
    name, content, message = DEFECTS[defect]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(documents([tmp_path / name], "text"))


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text' \(found: id, body\)"):
        list(documents([tmp_path / "a.parquet"], "text"))


def test_a_zst_file_that_breaks_off_is_not_taken_for_whole(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(100_000))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines)[:-100])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst"):
        list(documents([tmp_path / "a.jsonl.zst"], "text"))


def test_globs_that_match_nothing_and_unknown_kinds_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches"):
        expand([f"{tmp_path}/*.txt"])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv: unknown kind of file"):
        expand([f"{tmp_path}/*"])
