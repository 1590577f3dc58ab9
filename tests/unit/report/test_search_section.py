"""The page of a run with a search shows its candidates; that of a run without one says nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron_megatron.artifact import Artifact
from minitron_megatron.config.schema import Recipe
from minitron_megatron.report.stage import run

Inputs = dict[str, Artifact]


def candidate(name: str, parameters: int, losses: dict[int, float], verdict: str) -> dict[str, Any]:
    difference = None if verdict == "chosen" else {"step": max(losses), "value": 0.125, "stderr": 0.0125, "noise": False}
    told = {str(step): {"cross_entropy": {"value": loss, "stderr": 0.03}} for step, loss in losses.items()}
    return {"name": name, "figures": {"parameters": parameters}, "losses": told, "difference": difference, "verdict": verdict}


def ranking() -> dict[str, Any]:
    return {
        "rank_by": "cross_entropy", "windows": 48, "rounds": [40, 80], "steps": [0, 40, 80], "chosen": "L26-D576-H9-G3-F1024",
        "order_changes": {"from": 0, "to": 80, "pairs": 6, "swapped": 2},
        "candidates": [
            candidate("L26-D576-H9-G3-F1024", 97_400_000, {0: 4.5, 40: 3.9, 80: 3.75}, "chosen"),
            candidate("L30-D432-H9-G3-F1536", 100_900_000, {0: 5.5, 40: 4.2, 80: 3.875}, "worse"),
            candidate("L22-D576-H6-G3-F1536", 101_300_000, {0: 5.0, 40: 4.4}, "worse"),
        ],
    }  # fmt: skip


def page_of(recipe: Recipe, inputs: Inputs, folder: Path) -> str:
    run(recipe, inputs, folder)
    return (folder / "report.html").read_text()


def test_the_candidates_are_drawn_and_listed_with_errors_and_verdicts(recipe: Recipe, inputs: Inputs, tmp_path: Path) -> None:
    folder = tmp_path / "search"
    folder.mkdir()
    (folder / "ranking.json").write_text(json.dumps(ranking()))
    page = page_of(recipe, {**inputs, "search": Artifact(folder, {"id": "s1", "seconds": 1.0, "platform": "cpu", "layout": {}})}, tmp_path)
    section = page[page.index('<section id="search">') : page.index('<section id="cut">')]
    for item in ranking()["candidates"]:
        assert item["name"] in section
    assert section.count("<svg") == 1 and "Pareto front" in section
    assert "3.875 ± 0.030" in section and "0.125 ± 0.013" in section.replace("\u00a0", " ")
    assert section.count(">worse<") == 2 and "48 held-out windows" in section
    assert "From step 0 to step 80, 2 of 6 pairs changed their order." in section


def test_without_a_search_there_is_no_such_section(recipe: Recipe, inputs: Inputs, tmp_path: Path) -> None:
    assert 'id="search"' not in page_of(recipe, inputs, tmp_path)
