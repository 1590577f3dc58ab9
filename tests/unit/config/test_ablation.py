"""An ablation's file: what each variant overrides, which seeds it takes, and mistakes of all variants told before any is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from minitron_megatron.cli import app
from minitron_megatron.config.ablation import planned
from minitron_megatron.errors import RecipeError

Recipes = Callable[..., Path]
CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 131,
    "max_position_embeddings": 128,
}


@pytest.fixture
def ablation(tmp_path: Path, recipe_file: Recipes) -> Callable[..., Path]:
    """ablation(variants, key=value…): a file in a folder beside the recipe, whose model is of 8 layers."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    recipe_file(model={"path": str(tmp_path)}, runs="runs")
    (tmp_path / "ablations").mkdir()

    def write(*variants: dict[str, Any], **keys: Any) -> Path:
        file = tmp_path / "ablations" / "some.yaml"
        file.write_text(yaml.safe_dump({"name": "some", "recipe": "../recipe.yaml", "variants": list(variants), **keys}))
        return file

    return write


def problems_of(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        planned(file, list(overrides))
    return raised.value.problems


def test_each_variant_and_seed_is_a_run_of_its_own_below_the_ablations_folder(ablation: Callable[..., Path]) -> None:
    file = ablation(
        {"name": "a", "overrides": ["distill.steps=30"]},
        {"name": "b", "overrides": ["distill.loss=cross_entropy"], "seeds": []},
        overrides=["distill.steps=20", "distill.learning_rate.warmup_steps=2"],
        seeds=[1, 2],
        seed_keys=["distill.seed", "prune.seed"],
    )
    plan = planned(file, ["prune.target.ffn=24"])
    recipes = [trial.last.recipe for trial in plan.trials]
    assert [(recipe.runs, recipe.name) for recipe in recipes] == [("runs/some", "a-seed1"), ("runs/some", "a-seed2"), ("runs/some", "b")]
    assert [(recipe.distill.steps, recipe.distill.seed, recipe.prune.seed) for recipe in recipes] == [(30, 1, 1), (30, 2, 2), (20, 1234, 0)]
    assert [recipe.prune.target.ffn for recipe in recipes] == [24, 24, 24]
    above = planned(file, ["distill.steps=50"]).trials  # the command line stands above both
    assert [trial.last.recipe.distill.steps for trial in above] == [50, 50, 50]
    assert recipes[2].distill.loss == {"cross_entropy": 1.0}
    assert (plan.folder, plan.lenders) == (Path("runs/some"), [Path("runs/tiny")])


def test_the_ablations_own_name_and_seeds_are_replaced_on_the_command_line(ablation: Callable[..., Path]) -> None:
    file = ablation({"name": "a"}, seeds=[1, 2], seed_keys=["distill.seed"])
    plan = planned(file, ["name=other", "seeds=[7]", "runs=elsewhere"])
    assert [(trial.last.recipe.runs, trial.last.recipe.name) for trial in plan.trials] == [("elsewhere/other", "a-seed7")]
    assert plan.lenders == [Path("elsewhere/tiny")]


def test_a_seed_of_the_command_line_is_not_passed_over(ablation: Callable[..., Path]) -> None:
    """It would stand below the ablation's seeds; a variant without any takes it."""
    file = ablation({"name": "a"}, seeds=[1, 2], seed_keys=["distill.seed"])
    assert problems_of(file, "distill.seed=9") == [f"{file}: distill.seed=9: variant a takes its seeds [1, 2] there; give them as seeds=[…]"]
    assert [trial.last.recipe.distill.seed for trial in planned(ablation({"name": "a"}), ["distill.seed=9"]).trials] == [9]


def test_a_variant_may_be_a_family_in_a_file_of_its_own_or_in_an_override(ablation: Callable[..., Path], tmp_path: Path) -> None:
    steps = [{"name": "first", "prune": {"target": {"ffn": 64}}}, {"name": "last", "source": "pruned", "prune": {"target": {"ffn": 48}}}]
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    (tmp_path / "family.yaml").write_text(yaml.safe_dump(recipe | {"name": "rounds", "family": steps}))
    file = ablation(
        {"name": "file", "recipe": "../family.yaml"},
        {"name": "inline", "overrides": ["family=" + json.dumps(steps)]},
    )
    plan = planned(file)
    for trial in plan.trials:
        assert [(step.name, step.recipe.runs, target.ffn) for step, _, target in trial.steps] == [
            ("first", f"runs/some/{trial.variant}", 64),
            ("last", f"runs/some/{trial.variant}", 48),
        ]
    assert plan.lenders == [Path("runs/tiny"), Path("runs/rounds/first"), Path("runs/rounds/last")]


def test_mistakes_of_all_variants_are_told_at_once_and_one_that_several_make_once(ablation: Callable[..., Path]) -> None:
    variants = [
        {"name": name, "overrides": [item]} for name, item in (("a", "prune.target.ffn=100"), ("b", "distill.stpes=3"), ("c", "distill.steps=9"))
    ]
    first, second, third = problems_of(ablation(*variants))
    assert first == "variant a: prune.target.ffn=100 is larger than the source's 96"
    assert second.startswith("variant b: ") and "distill.stpes: unknown key 'stpes'; did you mean 'steps'?" in second
    assert third == "variant c: distill.learning_rate.warmup_steps=40 must be less than distill.steps=9"
    (problem,) = problems_of(ablation(*variants[:2], overrides=["distill.adam.bta1=0.9"]), "prune.target.ffn=8", "distill.stpes=null")[:1]
    assert problem.startswith("every variant: ") and "did you mean 'beta1'?" in problem


@pytest.mark.parametrize(
    ("variants", "keys", "told"),
    [
        ([{"name": "a"}, {"name": "a"}], {}, "variants: two are called a; give each its own name"),
        ([{"name": "a"}], {"seed_keys": ["prune.seed"]}, "seed_keys: prune.seed, but no seeds; give them, such as seeds: [1, 2, 3]"),
        (
            [{"name": "a", "overrides": ["prune.seed=4"]}],
            {"seeds": [1, 2], "seed_keys": ["prune.seed"]},
            "prune.seed=4: variant a takes its seeds [1, 2] there; give them as seeds=[…]",
        ),
        ([{"name": "a", "seeds": [1]}], {}, "seeds, but no seed_keys; name the keys that take them, such as seed_keys: [distill.seed]"),
        ([{"name": "a"}], {"seeds": [3, 3], "seed_keys": ["prune.seed"]}, "variant a: a seed is there twice in [3, 3]"),
        (
            [{"name": "a", "seeds": [1]}, {"name": "a-seed1"}],
            {"seed_keys": ["prune.seed"]},
            "variants: a-seed1 is the folder of a with a seed; give it another name",
        ),
        ([{"name": "a", "overides": []}], {}, "variants.0.overides: unknown key 'overides'; did you mean 'overrides'?"),
        ([{"name": "a"}], {"variant": []}, "variant: unknown key 'variant'; did you mean 'variants'?"),
        ([{"name": "a", "overrides": [{"prune.seed": 1}]}], {}, "input should be texts of the form key=value"),
        ([{"name": "a/b"}], {}, "variants.0.name: string should match pattern"),
        ([], {}, "variants: list should have at least 1 item"),
        ([{"name": "a", "recipe": "missing.yaml"}], {}, "recipe=missing.yaml: no such file"),
        ([{"name": "a"}], {"name": "tiny"}, "name=tiny is the recipe's own, whose run lies there; give the ablation another"),
        (
            [{"name": "a", "overrides": ["name=other"]}],
            {},
            "name=other: a variant's run lies in the ablation's folder, under the variant's own name; leave it out",
        ),
        ([{"name": "a", "overrides": ["step=b"]}], {}, "step=b: an ablation takes whole families; leave it out"),
        (
            [{"name": "a", "overrides": ["correct={steps: 200, source_peak: 1e-4, beside: true, sequence_length: 32, global_batch: 4}"]}],
            {},
            "every variant: correct.beside=true: nothing corrects beside the runs of an ablation",
        ),
        ([{"name": "a", "overrides": ["prune.seed"]}], {}, "override 'prune.seed' is not of the form key=value"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(ablation: Callable[..., Path], variants: list[dict[str, Any]], keys: dict[str, Any], told: str) -> None:
    (problem,) = problems_of(ablation(*variants, **keys))
    assert told in problem and "\n" not in problem


def test_nothing_is_written_for_a_mistake(ablation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["ablate", str(ablation({"name": "a"}, {"name": "b", "overrides": ["prune.target.ffn=100"]}))])
    assert isinstance(result.exception, RecipeError) and str(result.exception).startswith("variant b: ")
    assert not (tmp_path / "runs").exists()


def test_variants_of_a_family_that_goes_on_from_a_search_are_refused(ablation: Callable[..., Path], tmp_path: Path) -> None:
    values = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    searched = {"name": "large", "prune": {"target": {"ffn": None}}, "search": {"space": {"ffn": [16, 24]}, "memory": {"gib": 1}}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, "family": [searched, {"name": "small"}]}))
    (problem,) = problems_of(ablation({"name": "a"}))
    assert "step small goes on from a search" in problem
