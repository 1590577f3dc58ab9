"""Differences are told by pairing windows; what is noise is called so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from minitron_megatron.results.pareto import pareto_front, pareto_svg, ranking_markdown
from minitron_megatron.results.svg import standalone
from minitron_megatron.search.ranking import estimate, paired, ranking_of
from minitron_megatron.search.survey import Candidate
from minitron_megatron.search.trials import Trial

from .conftest import SMALL

RANDOM = np.random.default_rng(5)
TEXT_W = 3 + RANDOM.standard_normal(64)  # windows differ far more than models do


def test_the_error_of_a_mean_is_that_of_the_textbook() -> None:
    found = estimate(np.array([1.0, 2.0, 3.0, 6.0]))
    assert found == {"value": 3.0, "stderr": pytest.approx(math.sqrt(14 / 3 / 4))}


def test_a_difference_far_below_the_error_of_each_is_told_by_pairing() -> None:
    a_W, b_W = TEXT_W + 0.02 * RANDOM.standard_normal(64), TEXT_W + 0.03 + 0.02 * RANDOM.standard_normal(64)
    assert estimate(a_W)["stderr"] > 3 * 0.03
    found = paired(b_W, a_W)
    assert not found["noise"] and found["value"] == pytest.approx(0.03, abs=0.02)


def test_noise_is_called_noise_about_as_often_as_two_errors_say() -> None:
    called = sum(not paired(TEXT_W + 0.1 * RANDOM.standard_normal(64), TEXT_W + 0.1 * RANDOM.standard_normal(64))["noise"] for _ in range(2000))
    assert 60 < called < 150  # 5 % of 2000, ± 5 standard deviations


@pytest.fixture
def trials(tmp_path: Path) -> list[Trial]:
    """Four candidates: two that differ by noise, one worse, one that was left out after the first round."""
    return [
        _trial(tmp_path, 48, {0: 0.9, 10: 0.2}),
        _trial(tmp_path, 40, {0: 0.5, 10: 0.2}),
        _trial(tmp_path, 32, {0: 0.7, 10: 0.6}),
        _trial(tmp_path, 16, {0: 2.0}),
    ]


def _trial(folder: Path, ffn: int, above: dict[int, float]) -> Trial:
    arch = SMALL.resized(ffn=ffn)
    trial = Trial(Candidate(arch, SMALL, {"parameters": 100.0 * ffn, "latency": 1.0 * ffn}, {}), folder / f"F{ffn}")
    trial.folder.mkdir()
    lines = [{"step": step, **{kind: _windows(more).tolist() for kind in ("cross_entropy", "forward_kl")}} for step, more in above.items()]
    (trial.folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return trial


def _windows(more: float) -> NDArray[np.float64]:
    return TEXT_W + more + 0.05 * RANDOM.standard_normal(64)


def test_the_table_says_who_is_chosen_who_is_not_told_apart_and_who_is_worse(trials: list[Trial]) -> None:
    ranking = ranking_of(trials, rank_by="cross_entropy", rounds=[0, 10])
    verdicts = {item["name"]: item["verdict"] for item in ranking["candidates"]}
    close = {"L4-D32-H8-G2-F48", "L4-D32-H8-G2-F40"}
    assert {verdicts[name] for name in close} == {"chosen", "not told apart"} and ranking["chosen"] in close
    assert verdicts["L4-D32-H8-G2-F32"] == verdicts["L4-D32-H8-G2-F16"] == "worse"
    left_out = ranking["candidates"][-1]
    assert left_out["difference"]["step"] == 0 and len(left_out["losses"]) == 1
    (pair,) = [pair for pair in ranking["pairs"] if {pair["candidate"], pair["reference"]} == close]
    assert pair["noise"] and len(ranking["pairs"]) == 3
    table = ranking_markdown(ranking)
    assert table.count("not told apart") == 1 and "64 held-out windows" in table and "another seed is not in them" in table and "± 0" in table
    # right after pruning: 40 < 32 < 48, after training 32 is last
    assert ranking["order_changes"] == {"from": 0, "to": 10, "pairs": 3, "swapped": 1 + (ranking["chosen"] == "L4-D32-H8-G2-F48")}


def test_the_picture_holds_every_candidate_with_its_error_bars(trials: list[Trial]) -> None:
    ranking = ranking_of(trials, rank_by="cross_entropy", rounds=[0, 10])
    svg = pareto_svg(json.loads(json.dumps(ranking)))
    assert svg.startswith("<svg") and "latency of a request, ms" in svg and ranking["chosen"] in svg
    for text in ("Pareto front", "right after pruning", "after 10 steps", "chosen"):
        assert text in svg
    assert svg.count("<use ") >= 7  # four points after the first round, three after the last
    assert "--kept: #" in standalone(svg) and "var(--kept)" in standalone(svg)


def test_the_front_is_what_nothing_beats_in_both() -> None:
    assert pareto_front([(3, 1.0), (1, 3.0), (2, 3.5), (2, 2.0), (4, 1.0)]) == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_changes_of_order_are_counted_over_all_that_came_to_a_later_step(tmp_path: Path) -> None:
    trials = [_trial(tmp_path, 48, {0: 3.0, 5: 1.0, 9: 0.5}), _trial(tmp_path, 40, {0: 2.0, 5: 2.0}), _trial(tmp_path, 32, {0: 1.0, 5: 3.0})]
    ranking = ranking_of(trials, rank_by="forward_kl", rounds=[5, 9])
    assert ranking["order_changes"] == {"from": 0, "to": 5, "pairs": 3, "swapped": 3}
