"""`minitron run` with a search over hundreds of shapes: killed between candidates, continued, and its choice carried through the chain."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from minitron_megatron.arch.architecture import Architecture, parameter_count

from .test_chain import PATIENCE_SECONDS, command, environment, goes_on, start, up_to_date
from .tiny_model import write_model, write_recipe, write_text

pytestmark = pytest.mark.slow
BUDGET, ROUNDS = 40000, [4, 8]


def searching(folder: Path) -> Path:
    """The tiny recipe with a search in place of its sizes."""
    path = write_recipe(folder)
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    del values["prune"]
    values["parallel"] = {}
    values["distill"]["steps"] = 6
    values["search"] = {
        "space": {"layers": [2, 3, 4], "hidden": [16, 24, 32], "heads": [2, 4, 6, 8], "ffn": {"min": 16, "max": 48, "step": 4}},
        "parameters": BUDGET,
        "tolerance": 0.2,
        "latency": {"gpu": "H100_SXM", "batch": 1, "prompt": 32, "generate": 16},
        "shortlist": 4,
        "short_distillation": {"rounds": ROUNDS, "keep": 0.5},
        "jobs": 2,
    }
    path.write_text(yaml.safe_dump(values))
    return path


def kill_behind_the_first_candidate(recipe: Path, candidates: Path) -> list[int]:
    """Kills the command's own process group as soon as one candidate is through its first round; ids of processes that went on."""
    with (recipe.parent / "killed.log").open("w") as log:
        chain = subprocess.Popen(command(recipe), env=environment(recipe), cwd=recipe.parent, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 2 * PATIENCE_SECONDS
    while not list(candidates.glob("*/validation.jsonl")):
        assert chain.poll() is None and time.monotonic() < deadline, (recipe.parent / "killed.log").read_text()
        time.sleep(0.02)
    family = psutil.Process(chain.pid).children(recursive=True)
    os.killpg(chain.pid, signal.SIGKILL)
    chain.wait()
    # one that was still importing sees only then that its parent is gone
    until = time.monotonic() + 30
    while (alive := [process.pid for process in family if "minitron_megatron" in _words(process) and goes_on(process)]) and time.monotonic() < until:
        time.sleep(0.1)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return alive


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def test_a_search_that_was_killed_trains_the_rest_and_the_chain_takes_its_choice(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    write_model(tmp_path / "model", tmp_path / "text")
    recipe, run = searching(tmp_path), tmp_path / "runs" / "tiny"
    candidates = run / ".search.partial" / "candidates"
    assert kill_behind_the_first_candidate(recipe, candidates) == []
    done = {path.parent.name: path.read_bytes() for path in candidates.glob("*/validation.jsonl")}
    assert 1 <= len(done) < 4
    output = start(recipe, timeout_seconds=8 * PATIENCE_SECONDS)  # some twenty processes that import torch
    assert f"search: 4 candidates to step {ROUNDS[0]}, {len(done)} there already" in output

    search = run / "search"
    rows = list(csv.DictReader((search / "candidates.csv").open()))
    ranking = json.loads((search / "ranking.json").read_text())
    assert len(rows) == 3 * 3 * 4 * 9 >= 200
    assert len(ranking["candidates"]) == 4 == sum(bool(row["shortlist"]) for row in rows)
    assert sum(str(ROUNDS[-1]) in item["losses"] for item in ranking["candidates"]) == 2
    for name, before in done.items():  # what was told before the kill stands, bytes and all: those steps were not taken again
        assert (search / "candidates" / name / "validation.jsonl").read_bytes().startswith(before)

    chosen = Architecture.from_dict(json.loads((search / "architecture.json").read_text()))
    exported = json.loads((run / "export" / "model" / "config.json").read_text())
    assert abs(parameter_count(chosen) / BUDGET - 1) <= 0.2
    assert (exported["num_hidden_layers"], exported["hidden_size"], exported["intermediate_size"]) == (chosen.layers, chosen.hidden, chosen.ffn)
    page = (run / "report" / "report.html").read_text()
    assert "What was searched" in page and ranking["chosen"] in page
    once_more = [*command(recipe)[:3], "search", str(recipe), "distill.steps=7"]
    again = subprocess.run(once_more, env=environment(recipe), cwd=tmp_path, capture_output=True)
    assert up_to_date(again.stdout.decode()) == ["search"]
