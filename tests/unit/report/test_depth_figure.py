"""The page shows what leaving layers out did where a run measured it, and nothing of it where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.artifact import Artifact
from minitron_megatron.config.schema import Recipe
from minitron_megatron.report.depth_figure import depth_figure
from minitron_megatron.report.stage import run


def depth_of(removal: str, **changes: Any) -> dict[str, Any]:
    """depth.json of 12 layers, of which 3 go."""
    blocks = [[first, first + 1, first + 2] for first in range(10)] if removal == "block" else [[layer] for layer in range(12)]
    chosen = {"block": [[[4, 5, 6]]], "ranked": [[[5], [8], [4]]], "greedy": [[[5]], [[8]], [[4]]]}[removal]
    candidates = [{"layers": layers, "value": 3.1 + 0.05 * (layers[0] - 5) ** 2, "stderr": 0.04} for layers in blocks]
    rounds = [{"candidates": candidates, "chosen": layers} for layers in chosen]
    order = [layer for item in chosen for layers in item for layer in layers]
    unit = "LM loss, nats/token"
    found = {"criterion": "perplexity", "removal": removal, "unit": unit, "baseline": {"value": 3.0, "stderr": 0.04}, "rounds": rounds}
    return {**found, "order": order, "dropped_layers": sorted(order), "is_noise": False, **changes}


@pytest.mark.parametrize(("removal", "numbers"), [("block", 0), ("ranked", 0), ("greedy", 3)])
def test_every_way_of_removal_is_drawn(removal: str, numbers: int) -> None:
    svg = depth_figure(depth_of(removal))
    assert svg == depth_figure(depth_of(removal)), "the same figure is the same text"
    assert "#000" not in svg and "LM loss, nats/token" in svg and ">whole model<" in svg
    assert ("first of the 3 layers" in svg) == (removal == "block")
    # the numbers of order stand in another size than the axis's
    assert svg.count("8px") == numbers


@pytest.mark.parametrize("is_noise", [False, True])
def test_the_page_has_the_figure_where_there_is_a_stage_depth(recipe: Recipe, inputs: dict[str, Artifact], tmp_path: Path, is_noise: bool) -> None:
    run(recipe, inputs, tmp_path)
    assert "Layers left out" not in (tmp_path / "report.html").read_text()
    folder = tmp_path / "depth"
    folder.mkdir()
    (folder / "depth.json").write_text(json.dumps(depth_of("block", is_noise=is_noise)))
    run(recipe, {**inputs, "depth": Artifact(folder, inputs["prune"].manifest)}, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Layers left out" in page and page.count("<svg") == 6
    assert ("The choice is within noise" in page) == is_noise
