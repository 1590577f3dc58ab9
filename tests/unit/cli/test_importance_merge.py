"""`minitron importance merge`: a verb of two words beside one that takes a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.cli import app
from minitron_megatron.scores.statistics import INFLUENCE, Statistics

Run = Callable[..., Any]
ARCH = Architecture("llama", 1, 6, 8, 2, 4, 10, 131, False, 64, 1e-6, 10000.0)
WIDTHS = {"ffn": ARCH.ffn, "heads": ARCH.heads * ARCH.head_channels, "attention_norm": ARCH.hidden, "mlp_norm": ARCH.hidden}


def write(path: Path, first: int, samples: int, model: str = "m") -> Path:
    part = {"data": "d", "seed": 1, "first_sample": first, "samples": samples}
    sums = {(0, axis): torch.full((3, 2, width), float(samples), dtype=torch.float64) for axis, width in WIDTHS.items()}
    sums[0, INFLUENCE] = torch.ones(2, dtype=torch.float64)
    Statistics(ARCH, samples, sums, {"model": model, "sequence_length": 16, "precision": "fp32", "parts": [part]}).save(path)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", 0, 32)
    (tmp_path / "runs" / "b" / "importance").mkdir(parents=True)
    write(tmp_path / "runs" / "b" / "importance" / "scores.safetensors", 32, 8)
    return tmp_path


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_file_and_an_artifact_are_merged_and_the_next_step_is_told(here: Path, minitron: Run) -> None:
    ran = minitron("importance", "merge", "a", "runs/b/importance", "--output", "c")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == ["c: 40 samples of 2 parts; prune by them with: prune.scores_file=c"]
    assert Statistics.load(here / "c").sums[0, "ffn"].unique().tolist() == [40.0]
    assert minitron("importance", "merge", "a", "runs/b/importance").code == 0
    assert (here / "merged_scores.safetensors").read_bytes() == (here / "c").read_bytes()


MISTAKES = {
    "the same samples": (["a", "overlap"], "a and overlap both hold samples 16 to 31 of the same data"),
    "another model": (["a", "foreign"], "a and foreign differ in model"),
    "a file that is not there": (["a", "nowhere"], "nowhere: no whole scores file"),
    "a folder without scores": (["a", "runs"], "runs/scores.safetensors: no whole scores file"),
    "one file": (["a"], "a: merging takes two scores files or more"),
    "one file twice": (["a", "a"], "a is named twice; name every scores file once"),
    "an output that exists": (["a", "next", "--output", "overlap"], "overlap exists; remove it, or name another file with --output"),
    "an output nowhere": (["a", "next", "--output", "x/y"], "x: no such folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(mistake: str, here: Path, minitron: Run) -> None:
    arguments, expected = MISTAKES[mistake]
    write(here / "overlap", 16, 32)
    write(here / "foreign", 32, 8, model="n")
    write(here / "next", 32, 8)
    before, overlap = everything_in(here), (here / "overlap").read_bytes()
    ran = minitron("importance", "merge", *arguments)
    assert (ran.code, len(ran.err.splitlines()), ran.out) == (2, 1, "")
    assert expected in ran.err
    assert everything_in(here) == before
    assert (here / "overlap").read_bytes() == overlap


def test_help_of_both_forms() -> None:
    def help_of(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 0
        return " ".join(result.output.split())

    assert "importance merge [OPTIONS] {PART}..." in help_of("importance", "merge") or "PART..." in help_of("importance", "merge")
    assert "--output" in help_of("importance", "merge") and "importance.skip_samples" in help_of("importance", "merge")
    assert "RECIPE" in help_of("importance") and "minitron importance merge --help" in help_of("importance")
    assert " importance merge " in help_of()
