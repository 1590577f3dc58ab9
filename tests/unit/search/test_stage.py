"""The stage with jobs that are played: what is trained, what a second start finds done, and what comes out."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.artifact import Artifact
from minitron_megatron.chain import STAGES, run_id, stage_id, stage_inputs, stage_settings, stages_of
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.search import LatencyBudget
from minitron_megatron.config.trial import trial_recipe
from minitron_megatron.errors import LayoutError
from minitron_megatron.prune import stage as prune
from minitron_megatron.search import stage
from minitron_megatron.search.jobs import Job
from minitron_megatron.search.measure import Fit, Measured

from .conftest import SMALL

Recipes = Callable[..., Recipe]
SPACE = {"layers": [2, 3, 4], "hidden": [16, 24, 32], "heads": [4, 8], "ffn": {"min": 16, "max": 48, "step": 4}}
SHORT = {"rounds": [0, 50, 100], "keep": 0.5}
WINDOWS = 8


class Killed(BaseException):
    """Stands for what ends a search between two candidates."""


class Played:
    """Jobs whose loss is that of the shape: deep ones start badly and end well."""

    def __init__(self, dies_after: int = 10**9) -> None:
        self.dies_after, self.ran = dies_after, []  # type: ignore[var-annotated]

    def __call__(self, chains: Sequence[Sequence[Job]], *, where: Any, finished: Callable[[int], None]) -> None:
        for number, jobs in enumerate(chains):
            if len(self.ran) == self.dies_after:
                raise Killed
            values = yaml.safe_load(jobs[0].recipe.read_text())
            self.ran.append((values["name"], values["distill"].get("pause_after_steps", values["distill"]["steps"]), [job.verb for job in jobs]))
            self._play(jobs[0].recipe.parent, values)
            finished(number)

    def _play(self, folder: Path, values: dict[str, Any]) -> None:
        step, sizes = values["distill"].get("pause_after_steps", values["distill"]["steps"]), values["prune"]["target"]
        (folder / "prune").mkdir(exist_ok=True)
        (folder / "prune" / "manifest.json").write_text("{}")
        log = folder / ".distill.partial" / "validation.jsonl"
        log.parent.mkdir(exist_ok=True)
        # as the real one: a run from the start tells its first loss, one that goes on does not
        steps = {step} if log.is_file() else {0, step}
        with log.open("a") as file:
            for at in sorted(steps):
                depth = sizes.get("layers", SMALL.layers)
                loss = 5 + depth if at == 0 else 5 - depth - 0.01 * sizes.get("ffn", SMALL.ffn)
                losses = [loss + 0.1 * window for window in range(WINDOWS)]
                file.write(json.dumps({"step": at, "cross_entropy": losses, "forward_kl": losses}) + "\n")


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    """Of a run without an importance pass: its proxy is the number of parameters."""
    folders = {}
    for name in ("import", "data"):
        folders[name] = tmp_path / "runs" / "tiny" / name
        folders[name].mkdir(parents=True)
        (folders[name] / "result.json").write_text(json.dumps({"architecture": SMALL.to_dict()}))
    return {name: Artifact(path, {"id": f"{name}-1", "settings": {}, "inputs": {}}) for name, path in folders.items()}


@pytest.fixture
def recipe(recipe_of: Recipes) -> Recipe:
    searching = recipe_of(SPACE, parameters=18000, tolerance=0.15, shortlist=8, pool=1.0, short_distillation=SHORT)
    return searching.model_copy(update={"prune": searching.prune.model_copy(update={"scores": "random"})})


def search(recipe: Recipe, inputs: dict[str, Artifact], folder: Path, monkeypatch: pytest.MonkeyPatch, played: Played) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(stage, "run_chains", played)
    return stage.run(recipe, inputs, folder)


def test_a_killed_search_goes_on_with_the_candidates_that_are_left(
    recipe: Recipe, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = inputs["import"].path.parent
    whole = Played()
    search(recipe, inputs, run / "whole", monkeypatch, whole)
    assert len(whole.ran) == 8 + 4 + 2
    first, second, third = Played(dies_after=3), Played(dies_after=7), Played()
    for played in (first, second):
        with pytest.raises(Killed):
            search(recipe, inputs, run / "again", monkeypatch, played)
    search(recipe, inputs, run / "again", monkeypatch, third)
    assert first.ran + second.ran + third.ran == whole.ran
    for name in ("ranking.json", "architecture.json", "candidates.csv"):
        assert (run / "again" / name).read_bytes() == (run / "whole" / name).read_bytes()


def test_a_longer_shortlist_keeps_what_a_candidate_told_before_its_weights_went(
    recipe: Recipe, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the short list left out after a round goes on in the long one, which trains it anew from the start."""
    run = inputs["import"].path.parent
    recipe, short = with_rounds(recipe, [50, 100], 0.3), Played(dies_after=3)
    with pytest.raises(Killed):
        search(with_search(recipe, shortlist=3), inputs, run / "again", monkeypatch, short)
    long = Played()
    search(recipe, inputs, run / "again", monkeypatch, long)
    anew = {name for name, step, verbs in long.ran if step == 100 and verbs[0] == "prune"}
    assert anew & {name for name, step, _ in short.ran if step == 50}
    search(recipe, inputs, run / "whole", monkeypatch, Played())
    assert (run / "again" / "ranking.json").read_bytes() == (run / "whole" / "ranking.json").read_bytes()


def test_the_best_of_the_last_round_is_chosen_though_a_longer_shortlist_would_have_left_it_out_before(
    recipe: Recipe, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deep one alone comes to the end, and the start dies; beside seven others it is among the worst right after pruning."""
    folder, recipe = inputs["import"].path.parent / "again", with_rounds(recipe, [0, 50, 100], 0.3)
    with monkeypatch.context() as dying, pytest.raises(Killed):
        dying.setattr(stage, "write_json", kill)
        search(with_search(recipe, shortlist=1), inputs, folder, dying, Played())
    result, ranking = search(recipe, inputs, folder, monkeypatch, Played()), json.loads((folder / "ranking.json").read_text())
    through = {item["name"]: item["losses"]["100"]["cross_entropy"]["value"] for item in ranking["candidates"] if "100" in item["losses"]}
    assert len(through) == 2 and result["chosen"] == ranking["chosen"] == min(through, key=through.__getitem__) == result["shortlist"][0]
    verdicts = {item["name"]: item["verdict"] for item in ranking["candidates"]}
    assert verdicts.pop(result["chosen"]) == "chosen" and ranking["candidates"][0]["name"] == result["chosen"] and "chosen" not in verdicts.values()
    assert json.loads((folder / "architecture.json").read_text())["layers"] == SMALL.layers


def kill(*_: Any) -> None:
    raise Killed


def test_candidates_are_pruned_once_and_trained_to_each_round(recipe: Recipe, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played()
    search(recipe, inputs, inputs["import"].path.parent / "search", monkeypatch, played)
    assert [verbs for _, step, verbs in played.ran if step == 0] == [["prune", "distill"]] * 8
    assert [verbs for _, step, verbs in played.ran if step] == [["distill"]] * 6
    assert [step for _, step, _ in played.ran] == [0] * 8 + [50] * 4 + [100] * 2


def test_what_comes_out_is_the_best_after_training_and_prune_takes_it(
    recipe: Recipe, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = inputs["import"].path.parent / "search"
    result = search(recipe, inputs, folder, monkeypatch, Played())
    ranking, rows = json.loads((folder / "ranking.json").read_text()), list(csv.DictReader((folder / "candidates.csv").open()))
    chosen = Architecture.from_dict(json.loads((folder / "architecture.json").read_text()))
    assert prune._target(recipe.prune, {**inputs, "search": Artifact(folder, {})}, SMALL) == (chosen, [])
    assert ranking["chosen"] == result["chosen"] == ranking["candidates"][0]["name"]
    trained = [item for item in ranking["candidates"] if "100" in item["losses"]]
    assert chosen.to_dict() == min(trained, key=lambda item: item["losses"]["100"]["cross_entropy"]["value"])["architecture"]
    assert len(rows) == 3 * 3 * 2 * 9 == result["candidates"]
    fits = [row for row in rows if abs(int(row["parameters"]) - 18000) <= 0.15 * 18000]
    assert {row["name"] for row in fits} == {row["name"] for row in rows if row["removed_by"] in ("", "recipe")}
    assert [row["name"] for row in sorted((r for r in rows if r["shortlist"]), key=lambda r: int(r["shortlist"]))] == result["shortlist"]
    assert parameter_count(chosen) == next(int(row["parameters"]) for row in rows if row["name"] == result["chosen"])
    assert "| candidate |" in (folder / "table.md").read_text() and (folder / "pareto.svg").read_text().startswith("<?xml")


def test_what_was_measured_filters_and_a_continued_search_measures_nothing_anew(
    recipe: Recipe, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = inputs["import"].path.parent / "search"
    layer, output = Fit([1e-4, 1e-9, 1e-10], 0.0, None), Fit([1e-5, 1e-9], 0.0, None)
    timed: list[Architecture] = []

    def machine(shapes: Sequence[Architecture], request: LatencyBudget, *_: Any) -> Measured:
        timed.extend(shapes)
        return Measured(request, layer, layer, output)

    request = LatencyBudget(kind="measured", prompt=16, generate=4, shapes=5, limit_ms=1.9)
    recipe, known = with_search(recipe, latency=request), Measured(request, layer, layer, output)
    monkeypatch.setattr(stage, "measure", machine)
    with pytest.raises(Killed):
        search(recipe, inputs, folder, monkeypatch, Played(dies_after=1))
    assert len(set(timed)) == 5 and {arch.layers for arch in timed} == {1}
    monkeypatch.setattr(stage, "measure", kill)
    result, rows = search(recipe, inputs, folder, monkeypatch, Played()), list(csv.DictReader((folder / "candidates.csv").open()))
    for row in rows:
        arch = SMALL.resized(**{axis: int(row[axis]) for axis in ("layers", "hidden", "heads", "ffn")})
        assert float(row["latency"]) == pytest.approx(1000 * known.seconds(arch))
    slow = {row["name"] for row in rows if float(row["latency"]) > 1.9}
    assert 0 < result["survivors"] < sum(row["removed_by"] in ("", "latency") for row in rows)
    assert {row["name"] for row in rows if row["removed_by"] == "latency"} <= slow and not slow & set(result["shortlist"])


def test_too_few_gpus_are_told_before_anything_is_measured(recipe: Recipe, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(stage, "_latency", kill)
    asked = with_search(recipe, jobs=3).model_copy(update={"platform": "cuda"})
    with pytest.raises(LayoutError, match=r"search.jobs=3 candidates × 1 processes need 3 GPUs, there are 2"):
        search(asked, inputs, inputs["import"].path.parent / "search", monkeypatch, Played())


def test_only_what_was_told_is_kept_of_the_candidates(recipe: Recipe, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = inputs["import"].path.parent / "search"
    search(recipe, inputs, folder, monkeypatch, Played())
    left = {path.name for candidate in (folder / "candidates").iterdir() for path in candidate.iterdir()}
    assert left == {"recipe.yaml", "validation.jsonl"}  # and log.txt, of jobs that are not played


def test_a_candidate_s_recipe_is_the_run_s_own_with_sizes_and_a_short_schedule(
    recipe: Recipe, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = inputs["import"].path.parent / "search"
    search(recipe, inputs, folder, monkeypatch, Played())
    own = Recipe.model_validate(yaml.safe_load(next((folder / "candidates").glob("*/recipe.yaml")).read_text()))
    assert own.search is None and own.prune.target.sizes() and own.prune.scores == "random"
    assert (own.distill.steps, own.distill.learning_rate) == (100, recipe.distill.learning_rate)
    assert own.model == recipe.model and own.data == recipe.data and own.precision == recipe.precision


def with_search(recipe: Recipe, **values: Any) -> Recipe:
    assert recipe.search
    return recipe.model_copy(update={"search": recipe.search.model_copy(update=values)})


def with_rounds(recipe: Recipe, rounds: list[int], keep: float) -> Recipe:
    assert recipe.search
    short = recipe.search.short_distillation.model_copy(update={"rounds": rounds, "keep": keep})
    return with_search(recipe, short_distillation=short)


def test_the_search_is_part_of_the_chain_only_where_it_is_asked_for_and_prune_reads_it(recipe: Recipe) -> None:
    assert "search" in [item.name for item in stages_of(recipe)]
    assert stage_inputs(STAGES["prune"], recipe) == ("import", "search")
    without = recipe.model_copy(update={"search": None})
    assert "search" not in [item.name for item in stages_of(without)]
    assert stage_inputs(STAGES["prune"], without) == ("import",)


def test_candidates_learn_from_the_run_s_own_teachers_on_its_own_labels(recipe: Recipe) -> None:
    correct = {"steps": 200, "sequence_length": 32, "global_batch": 4, "source_peak": 1e-4, "learning_rate": {}}
    sections = {"teachers": {"models": [{"path": "source", "weight": 0.5}]}, "correct": correct, "labels": {}}
    asked = Recipe.model_validate({**recipe.model_dump(), **sections})
    assert asked.search
    candidate = Recipe.model_validate(trial_recipe(asked, asked.search, {"ffn": 16}).model_dump(mode="json", exclude_none=True))
    reads = stage_inputs(STAGES["search"], asked)
    assert {"teachers", "correct", "labels"} <= set(reads)
    # a candidate makes its pruned model alone: all else that its two jobs read is the search's, made under the same settings
    assert {*stage_inputs(STAGES["prune"], candidate), *stage_inputs(STAGES["distill"], candidate)} == {*reads, "prune"}
    assert [stage_settings(STAGES[name], candidate) for name in reads] == [stage_settings(STAGES[name], asked) for name in reads]
    weighted = Recipe.model_validate({**asked.model_dump(), "teachers": {"models": [{"path": "source", "weight": 0.7}]}})
    assert stage_id(STAGES["search"], weighted, {}) != stage_id(STAGES["search"], asked, {})


def test_the_long_distillation_s_length_is_no_part_of_a_search_and_its_loss_is(recipe: Recipe) -> None:
    def identity(**values: Any) -> str:
        return stage_id(STAGES["search"], recipe.model_copy(update={"distill": recipe.distill.model_copy(update=values)}), {})

    assert identity(steps=900) == identity() != identity(loss={"cross_entropy": 1.0})
    assert stage_id(STAGES["search"], with_search(recipe, jobs=3), {}) == identity()
    assert stage_id(STAGES["search"], recipe.model_copy(update={"precision": "bf16"}), {}) != identity()


def test_another_shortlist_or_budget_goes_on_with_the_same_work(recipe: Recipe) -> None:
    stage_of = STAGES["search"]
    for other in (with_search(recipe, shortlist=9), with_search(recipe, parameters=9e9)):
        assert run_id(stage_of, other, {}) == run_id(stage_of, recipe, {})
        assert stage_id(stage_of, other, {}) != stage_id(stage_of, recipe, {})
