"""Every file in configs/ is one that can be run; those of the papers give the papers' shapes and the announced numbers of parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minitron_megatron.advice.rules import Subject, advise
from minitron_megatron.arch.architecture import Architecture, parameter_count, parameters_by_part
from minitron_megatron.arch.hf_config import architecture_from_hf
from minitron_megatron.cli import app
from minitron_megatron.conductor import needed_for
from minitron_megatron.config.ablation import planned
from minitron_megatron.config.family import Step, checked_steps, picked_steps

ROOT = Path(__file__).parents[3]
# recipe or step → billions of parameters as announced (P1, P2; Qwen3: NVIDIA's post says 6B, exactly as counted by its shapes), what the papers list
# as (layers, hidden, heads, key/value groups, FFN), and training tokens in billions
PUBLISHED = {
    "nemotron4_15b_to_8b": (8.27, (32, 4096, 48, 8, 16384), 94),
    "nemotron4_8b_to_4b": (4.19, (32, 3072, 24, 8, 9216), 94),
    "nemotron4_15b_8b_4b step=8b": (8.27, (32, 4096, 48, 8, 16384), 94),
    "nemotron4_15b_8b_4b step=4b": (4.19, (32, 3072, 24, 8, 9216), 94),
    "llama31_8b_to_4b_width": (4.51, (32, 3072, 32, 8, 9216), 94),
    "llama31_8b_to_4b_width_fp8": (4.51, (32, 3072, 32, 8, 9216), 94),
    "llama31_8b_to_4b_depth": (4.54, (16, 4096, 32, 8, 14336), 94),
    "mistral_nemo_12b_to_8b": (8.4, (40, 4096, 32, 8, 11520), 380),
    "qwen3_8b_to_6b": (5.98, (36, 3584, 32, 8, 9216), 90),
    "qwen3_8b_to_6b_depth": (5.87, (24, 4096, 32, 8, 12288), 90),
}
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
ABLATIONS = sorted(path.stem for path in (ROOT / "configs" / "ablations").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # where people start, and what the recipes' paths are relative to
    monkeypatch.setenv("COLUMNS", "200")


def checked(name: str) -> list[tuple[Step, Architecture, Architecture]]:
    """All steps: a step's source may be the target of the one before it."""
    return checked_steps(picked_steps(f"configs/{name}.yaml", []))


def of(published: str) -> tuple[Step, Architecture, Architecture]:
    name, *step = published.split(" step=")
    return next(found for found in checked(name) if found[0].name == "".join(step))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_its_model_its_layout_and_its_batch(name: str) -> None:
    assert checked(name)


def test_no_published_recipe_is_left_out() -> None:
    published = {name.split(" ")[0] for name in PUBLISHED}
    assert published == {name for name in RECIPES if not name.startswith("smollm2")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_gives_the_published_shape_parameters_and_tokens(name: str) -> None:
    billions, shape, tokens = PUBLISHED[name]
    step, _, target = of(name)
    assert (target.layers, target.hidden, target.heads, target.kv_groups, target.ffn) == shape
    assert parameter_count(target) / 1e9 == pytest.approx(billions, rel=0.01)
    distill = step.recipe.distill
    # a step more or less than the announced tokens
    assert distill.steps * distill.global_batch * distill.sequence_length == pytest.approx(tokens * 1e9, abs=distill.global_batch * 8192)


@pytest.mark.parametrize("name", PUBLISHED)
def test_advice_has_nothing_serious_against_a_published_recipe(name: str) -> None:
    assert [finding.what for finding in advise(Subject(*of(name))) if finding.severity == "serious"] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_fills_whole_nodes_of_eight_gpus_that_hold_both_models(name: str) -> None:
    step, source, target = of(name)
    parallel = step.recipe.parallel
    assert parallel.processes % 8 == 0
    # bytes a parameter: bf16 weights of both, one of a teacher's layers in FP8; of the student fp32 gradients, and fp32 weights and Adam's moments
    # shared by the data-parallel ranks
    by_part, fp8 = parameters_by_part(source), step.recipe.fp8 is not None and step.recipe.fp8.teacher != "none"
    of_layers = 0 if not fp8 else parameter_count(source) - by_part["embedding"] - by_part["output"]
    teacher, student = 2 * parameter_count(source) - of_layers, (2 + 4 + 12 / parallel.data) * parameter_count(target)
    gib = (teacher + student) / (parallel.tensor * parallel.pipeline) / 2**30
    assert gib < 45  # of 80: the rest is for activations
    text = (ROOT / "configs" / f"{name.split(' ')[0]}.yaml").read_text()
    if " " not in name:
        shares = [f"{count / (parallel.tensor * parallel.pipeline) / 1e9:.0f}" for count in (teacher, student)]
        assert f"{shares[0]} GB for the teacher and {shares[1]} for the student" in text


@pytest.mark.parametrize("name", ["llama31_8b_to_4b_width", "nemotron4_15b_8b_4b"])
def test_show_tells_the_parameters_of_a_model_that_is_not_on_this_disk(name: str) -> None:
    shown = CliRunner().invoke(app, ["show", f"configs/{name}.yaml"])
    assert shown.exit_code == 0, shown.output
    for published, (billions, _, _) in PUBLISHED.items():
        assert (f"{billions:.2f}\u00a0B" in shown.output) or not published.startswith(name)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_can_start(name: str) -> None:
    plan = planned(f"configs/ablations/{name}.yaml", [])
    assert plan.name == name and len({trial.variant for trial in plan.trials}) > 1
    if name in ("aggregation_pairs", "criteria", "importance_against_random"):
        assert all("distill" not in needed_for("evaluate", trial.last.recipe) for trial in plan.trials)


@pytest.mark.parametrize("name", ["aggregation_pairs", "losses", "kd_against_cross_entropy", "one_shot_against_iterative", "width_against_depth"])
def test_variants_that_are_compared_have_one_size(name: str) -> None:
    sizes = [parameter_count(trial.steps[-1][2]) for trial in planned(f"configs/ablations/{name}.yaml", []).trials]
    assert max(sizes) / min(sizes) < 1.01


def test_importance_and_random_are_compared_at_one_size_of_each_axis() -> None:
    sizes: dict[str, set[int]] = {}
    for trial in planned("configs/ablations/importance_against_random.yaml", []).trials:
        sizes.setdefault(trial.variant.split("_")[0], set()).add(parameter_count(trial.steps[-1][2]))
    assert {axis: len(found) for axis, found in sizes.items()} == {"ffn": 1, "heads": 1, "channels": 1}


def test_the_nine_pairs_are_all_there() -> None:
    trials = planned("configs/ablations/aggregation_pairs.yaml", []).trials
    pairs = {(trial.last.recipe.prune.aggregation.batch, trial.last.recipe.prune.aggregation.sequence) for trial in trials}
    assert len(pairs) == len(trials) == 9
    assert all(
        trial.variant == "_".join((trial.last.recipe.prune.aggregation.batch, trial.last.recipe.prune.aggregation.sequence)) for trial in trials
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "architectures").glob("*.json")), ids=lambda path: path.stem)
def test_every_architecture_is_one_that_is_read(path: Path) -> None:
    assert architecture_from_hf(json.loads(path.read_text())).layers
