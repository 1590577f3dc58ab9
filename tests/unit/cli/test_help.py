"""`--help` of every verb, and `show`, which looks before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from minitron_megatron import __version__
from minitron_megatron.chain import STAGES
from minitron_megatron.cli import STAGE_HELP, app

Run = Callable[..., Any]
EXAMPLE = "configs/smollm2_135m_to_97m.yaml"


def help_of(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("verb", [*STAGE_HELP, "run", "show"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_explains_itself_with_an_example(verb: str, flag: str) -> None:
    text = help_of(verb, flag)
    usage = text.split("...")[0]
    assert f"{verb} [OPTIONS]" in usage and usage.count("RECIPE") == 1 and usage.count("key=value") == 1
    assert "[[" not in usage
    assert f"for example {EXAMPLE}" in text
    assert "for example distill.steps=300 parallel.data=2" in text


def test_the_first_page_lists_every_verb_and_a_first_run() -> None:
    text = help_of("--help")
    for verb in (*STAGE_HELP, "run", "show", "doctor"):
        assert f" {verb} " in text
    assert f"minitron run {EXAMPLE}" in text
    assert help_of("doctor", "--help")


def test_the_examples_recipe_comes_with_the_project() -> None:
    from pathlib import Path

    from minitron_megatron.config.family import picked_steps

    repository = Path(__file__).resolve().parents[3]
    for file in (repository / "configs").glob("*.yaml"):
        assert picked_steps(file)
    assert (repository / EXAMPLE).is_file()


def test_verbs_are_the_stages_of_the_chain_in_its_order() -> None:
    assert list(STAGE_HELP) == list(STAGES)
    seen: set[str] = set()
    for stage in STAGES.values():
        assert set(stage.inputs) <= seen, f"{stage.name} reads what is made after it"
        seen.add(stage.name)


def test_the_version_is_the_packages() -> None:
    assert help_of("--version") == __version__


def test_show_prints_both_architectures_and_writes_nothing(project: Any, minitron: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron_megatron.arch.architecture import parameter_count
    from minitron_megatron.arch.source import source_architecture

    monkeypatch.setenv("COLUMNS", "160")
    ran = minitron("show", project.recipe, "parallel.pipeline=2", "distill.loss=cross_entropy")
    assert (ran.code, ran.err) == (0, "")
    arch = source_architecture(str(project.model))
    for text in (f"{parameter_count(arch):,}", f"{parameter_count(arch.resized(ffn=16)):,}", "cross_entropy: 1.0", "Layers per pipeline stage"):
        assert text in ran.out
    assert project.written() == set()


SEARCH = "search={space: {layers: [1, 2, 3], ffn: [8, 12, 16, 28]}, parameters: 20000, tolerance: 0.1}"


def test_show_prints_what_each_budget_removes_from_the_space(project: Any, minitron: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from minitron_megatron.arch.architecture import parameter_count
    from minitron_megatron.arch.source import source_architecture

    monkeypatch.setenv("COLUMNS", "160")
    ran = minitron("show", project.recipe, "prune.target.ffn=null", SEARCH)
    arch = source_architecture(str(project.model))
    counts = [parameter_count(arch.resized(layers=layers, ffn=ffn)) for layers in (1, 2, 3) for ffn in (8, 12, 16, 28)]
    left = [count for count in counts if 18000 <= count <= 22000]
    assert (ran.code, ran.err) == (0, "") and 0 < len(left) < 12
    for text in ("Space of 12 candidates", "20,000 ± 10 %", f"{len(left)} of 12 candidates are left, {min(left):,} to {max(left):,} parameters"):
        assert text in ran.out
    assert project.written() == set()


def test_show_says_which_steps_of_a_family_wait_for_a_search(project: Any, minitron: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    ran = minitron("show", project.recipe, "prune.target.ffn=null", f"family=[{{name: a, {SEARCH.replace('search=', 'search: ')}}}, {{name: b}}]")
    assert (ran.code, ran.err) == (0, "") and "Space of 12 candidates" in ran.out
    assert "Step b goes on from what a search finds; once that is there, step=b shows it." in ran.out


def test_a_budget_that_nothing_meets_is_told_before_the_first_stage(project: Any, minitron: Run) -> None:
    ran = minitron("run", project.recipe, "prune.target.ffn=null", SEARCH, "search.parameters=1e9")
    assert ran.code == 2 and "search: none of 12 candidates is left (parameters removes 12); nearest miss: L3-" in ran.err
    assert ran.err.count("\n") == 1 and project.written() == set()


def test_search_without_its_section_says_what_is_missing(project: Any, minitron: Run) -> None:
    ran = minitron("search", project.recipe)
    assert ran.code == 2 and "no section 'search'" in ran.err
