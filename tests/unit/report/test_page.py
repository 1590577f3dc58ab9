"""The report is one page that needs nothing else, says what was done, and names what is missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from minitron_megatron.artifact import Artifact
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import ArtifactError
from minitron_megatron.report.figures import block_influence_bars, importance_heatmap, kl_curve
from minitron_megatron.report.stage import read_run, run

SECTIONS = ("results", "training", "importance", "cut", "generations", "reproduce")


Inputs = dict[str, Artifact]


class _Outline(HTMLParser):
    """Section ids, links to the outside, and the number of figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "section":
            self.sections.append(values["id"] or "")
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]


def _page(recipe: Recipe, inputs: Inputs, folder: Path) -> str:
    run(recipe, inputs, folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_outside(recipe: Recipe, inputs: Inputs, tmp_path: Path) -> None:
    page = _page(recipe, inputs, tmp_path)
    outline = _Outline(page)
    assert all(link.startswith(("data:", "#")) for link in outline.links)
    assert not {"script", "link", "iframe"} & set(outline.tags)
    assert not re.search(r"url\((?!#)|@import|@font-face", page)
    assert len(page.encode()) < 1_500_000


def test_the_page_has_every_section_and_figure(recipe: Recipe, inputs: Inputs, tmp_path: Path) -> None:
    page = _page(recipe, inputs, tmp_path).replace("\u00a0", " ")
    outline = _Outline(page)
    assert tuple(outline.sections) == SECTIONS
    assert outline.tags.count("svg") == 5
    assert "left out" not in page
    for text in (
        "134.5 M → 97.4 M parameters (−27.6 %)",
        "from 1.93 to 0.312 nats/token",
        "&lt;the&gt; &amp; the",
        "Score: input of second, l2 over samples of mean over tokens.",
        "megatron-core",
    ):
        assert text in page
    assert all(artifact.id in page for artifact in inputs.values())


@pytest.mark.parametrize("stage", ["importance", "prune", "distill", "evaluate"])
def test_a_missing_stage_is_named_the_rest_shown(stage: str, recipe: Recipe, inputs: Inputs, tmp_path: Path) -> None:
    del inputs[stage]
    page = _page(recipe, inputs, tmp_path)
    assert f"the stage {stage}" in page
    assert tuple(_Outline(page).sections) == SECTIONS


def test_a_figure_without_its_numbers_is_named(recipe: Recipe, inputs: Inputs, tmp_path: Path) -> None:
    (inputs["importance"].path / "summary.json").write_text('{"ffn": []}')
    (inputs["distill"].path / "metrics.jsonl").write_text('{"step": 1, "forward_kl": 0.5, "learning_rate": 1e-4}\n')
    page = _page(recipe, inputs, tmp_path)
    assert "no Block Influence" in page
    assert "no scores of FFN neurons" in page
    assert "no validation" in page


@pytest.mark.parametrize(
    ("pruned_by", "told"),
    [
        ("random", "Pruned by random scores, not by these: the cut is not marked."),
        (
            {"ffn": {"criterion": "before_activation", "batch": "l2", "sequence": "mean"}},
            "Pruned by before activation, l2 over samples of mean over tokens, not by these: the cut is not marked.",
        ),
        ({"ffn": {"criterion": "input_of_second", "batch": "l2", "sequence": "mean"}}, None),
    ],
)
def test_the_cut_is_marked_only_in_the_scores_that_made_it(
    pruned_by: str | dict[str, dict[str, str]], told: str | None, recipe: Recipe, inputs: Inputs, tmp_path: Path
) -> None:
    inputs["prune"].result["ranked_by"] = pruned_by
    page = _page(recipe, inputs, tmp_path)
    assert ("white line: the cut" in page) == (told is None)
    assert told is None or told in page


def test_a_run_without_any_stage_still_makes_a_page(recipe: Recipe, tmp_path: Path) -> None:
    page = _page(recipe, {}, tmp_path)
    assert page.count("left out") >= 5
    assert "<svg" not in page


def test_figures_take_colours_and_font_from_the_page(recipe: Recipe, inputs: Inputs, tmp_path: Path) -> None:
    steps = read_run(recipe, inputs).steps
    svg = kl_curve(steps)
    assert "var(--kept)" in svg and "var(--sans)" in svg
    assert "#000" not in svg, "a mark that became no variable would be black on black in the dark"


def test_a_figure_is_the_same_text_every_time() -> None:
    assert block_influence_bars([0.5, 0.1, 0.2], [1]) == block_influence_bars([0.5, 0.1, 0.2], [1])


def test_a_long_run_does_not_make_a_long_page() -> None:
    steps = [{"step": step, "forward_kl": 1 + step % 7, "learning_rate": 1e-4} for step in range(20_000)]
    assert len(kl_curve(steps)) < 100_000


def test_the_heat_map_says_how_many_are_kept_where_layers_differ() -> None:
    svg = importance_heatmap([np.arange(8.0), np.ones(8), np.zeros(8)], [4, None, 6])
    assert "4–6 of 8 kept" in svg
    assert svg.count(">dropped<") == 1


def test_the_recipe_on_the_page_can_be_run_again(recipe: Recipe, inputs: Inputs, tmp_path: Path) -> None:
    shown = re.search(r"<summary>Recipe, resolved</summary>\s*<pre>(.*?)</pre>", _page(recipe, inputs, tmp_path), re.S)
    assert shown is not None
    assert Recipe.model_validate(yaml.safe_load(shown[1])) == recipe


def test_a_truncated_metrics_file_is_a_one_line_error(recipe: Recipe, inputs: Inputs, tmp_path: Path) -> None:
    (inputs["distill"].path / "metrics.jsonl").write_text('{"step": 1}\n{"step"')
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl: no valid JSON") as error:
        run(recipe, inputs, tmp_path)
    assert "\n" not in str(error.value)
