"""A distillation that pauses and goes on is the uninterrupted one, and tells the loss of each held-out window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.artifact import find_artifact
from minitron_megatron.config.parallel import Parallel

from .conftest import Identical, Record
from .house import copy_of, publish_stage, recipe_for
from .pool import Pool
from .tiny import DP2, ONE, PP2, TP2_SP, layout_name, name_of, relative_difference

PAUSES = (0, 13)
"""Neither steps that are saved (8, 16) nor, but for 0, steps that are validated (6, 12, 18)."""


def windows(folder: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in map(json.loads, (folder / "validation.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def whole(pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs` with the distillation of one process, not interrupted."""
    runs = copy_of(house, tmp_path_factory.mktemp("whole") / "runs")
    pool.run(publish_stage, "distill", recipe_for(runs, ONE), processes=1)
    return runs


def test_a_run_that_pauses_three_times_ends_in_the_same_bits(pool: Pool, house: Path, whole: Path, tmp_path: Path, identical: Identical) -> None:
    runs = copy_of(house, tmp_path / "runs")
    at_pause = {}
    for step in PAUSES:
        pool.run(publish_stage, "distill", recipe_for(runs, ONE, pause_after_steps=step), processes=1)
        assert find_artifact(runs / "tiny", "distill") is None
        at_pause[step] = windows(runs / "tiny" / ".distill.partial")
        assert max(at_pause[step]) == step
    pool.run(publish_stage, "distill", recipe_for(runs, ONE), processes=1)
    paused, straight = (find_artifact(path / "tiny", "distill") for path in (runs, whole))
    assert paused and straight and paused.id == straight.id
    assert identical("distillation that paused", "one", paused.result["weights_sha256"] == straight.result["weights_sha256"])
    assert paused.result["validation"] == straight.result["validation"]
    found, expected = windows(paused.path), windows(straight.path)
    assert found.keys() == expected.keys() | set(PAUSES)
    assert all(found[step] == expected[step] for step in expected)
    assert at_pause[13][6] == found[6]


@pytest.mark.parametrize("parallel", [DP2, TP2_SP, pytest.param(PP2, marks=pytest.mark.slow)], ids=name_of)
def test_window_losses_are_those_of_one_process_and_their_mean_is_the_validation(
    pool: Pool, house: Path, whole: Path, tmp_path: Path, parallel: Parallel, measured: Record
) -> None:
    runs = copy_of(house, tmp_path / "runs")
    pool.run(publish_stage, "distill", recipe_for(runs, parallel, pause_after_steps=0), processes=parallel.processes)
    found, expected = windows(runs / "tiny" / ".distill.partial")[0], windows(whole / "tiny" / "distill")[0]
    for name in ("forward_kl", "cross_entropy"):
        assert len(found[name]) == 5 and len(set(found[name])) == 5
        # fp32, other orders of additions under tensor parallelism
        assert measured("losses of held-out windows", layout_name(parallel), relative_difference(found[name], expected[name])) <= 1e-5
        record = json.loads((runs / "tiny" / ".distill.partial" / "metrics.jsonl").read_text().splitlines()[0])
        assert sum(found[name]) / 5 == pytest.approx(record["validation"][name], rel=1e-12)  # fp64; windows of one length
