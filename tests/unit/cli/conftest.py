"""A recipe for a tiny model that may be broken, and ways to run it: in this process, or as a user does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass
class Project:
    """A folder with model/, text/ and recipe.yaml; runs go below it."""

    folder: Path
    recipe: Path
    model: Path

    def written(self) -> set[str]:
        """Everything but what was there before any command."""
        before = {"model", "text", "recipe.yaml"}
        return {path.name for path in self.folder.iterdir()} - before


@pytest.fixture
def project(tiny_hf_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(tiny_hf_model("llama"), tmp_path / "model"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("the state of our union is strong")
    values = {
        "name": "tiny",
        "platform": "cpu",
        "precision": "fp32",
        "model": {"path": "model"},
        "data": {"train": ["text/*.txt"], "workers": 1},
        "importance": {"samples": 4, "sequence_length": 32},
        "prune": {"target": {"ffn": 16}},
        "distill": {"steps": 100, "sequence_length": 32, "global_batch": 4},
        "evaluate": {"sequence_length": 32},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return Project(tmp_path, Path("recipe.yaml"), model)


@pytest.fixture
def minitron(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """minitron(verb, …) in this process, through the entry point; a stage that starts other processes takes seconds."""
    from minitron_megatron import cli

    def run(*arguments: Any) -> Ran:
        monkeypatch.setattr(sys, "argv", ["minitron", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capfd.readouterr()
        return Ran(int(left.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def worker(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """One stage as its worker process runs it, in this process."""
    from minitron_megatron import worker as module
    from minitron_megatron.failure import LAUNCHED

    monkeypatch.delenv(LAUNCHED, raising=False)

    def run(*arguments: Any) -> Ran:
        capfd.readouterr()
        code = module.main(list(map(str, arguments)))
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def command() -> Callable[..., Ran]:
    """`python -m minitron_megatron.cli …` in the current folder."""

    def run(*arguments: Any) -> Ran:
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-m", "minitron_megatron.cli", *map(str, arguments)]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        return Ran(done.returncode, done.stdout, done.stderr)

    return run
