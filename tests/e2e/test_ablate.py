"""An ablation of a tiny model, each stage in this process: what variants share is made once, and one table tells them apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from minitron_megatron import conductor
from minitron_megatron.ablate import collect, run_trials
from minitron_megatron.config.ablation import planned

from .in_process import STARTED, in_this_process
from .tiny_model import write_model, write_recipe, write_text

ROUNDS = "family=[{name: first, prune: {target: {ffn: 40}}}, {name: last, source: pruned, teacher: original, prune: {target: {ffn: 32}}}]"
VARIANTS = [
    {"name": "activation", "overrides": ["prune.target.ffn=32"]},
    {"name": "random", "overrides": ["prune.target.ffn=32", "prune.scores=random"], "seeds": [1, 2]},
    {"name": "two_rounds", "overrides": [ROUNDS]},
    {"name": "trained", "overrides": ["prune.target.ffn=32", "evaluate.models=[teacher,distilled]"]},
]


@pytest.fixture
def ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(conductor, "launch", in_this_process)
    write_text(tmp_path / "text")
    write_model(tmp_path / "model", tmp_path / "text")
    values = yaml.safe_load(write_recipe(tmp_path).read_text()) | {"parallel": {}, "prune": {"target": {}}}
    values["distill"] |= {"steps": 4, "validate_every_steps": 4, "save_every_steps": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "ablations").mkdir()
    file = tmp_path / "ablations" / "scores.yaml"
    shared = ["evaluate.models=[teacher,pruned]", "evaluate.generate_tokens=0"]
    file.write_text(
        yaml.safe_dump({"name": "scores", "recipe": "../recipe.yaml", "overrides": shared, "seed_keys": ["prune.seed"], "variants": VARIANTS})
    )
    STARTED.clear()
    return file


def test_an_ablation_makes_what_variants_share_once_and_ends_in_one_table(ablation: Path) -> None:
    plan = planned(ablation)
    assert run_trials(plan) == 0
    assert [
        *(f"activation {stage}" for stage in ("import", "data", "importance", "prune", "evaluate")),
        *(f"random-seed{seed} {stage}" for seed in (1, 2) for stage in ("prune", "evaluate")),
        "first prune",  # import, data and importance are those of the first variant
        *(f"last {stage}" for stage in ("import", "data", "importance", "teachers", "prune", "evaluate")),
        *(f"trained {stage}" for stage in ("distill", "evaluate")),
    ] == STARTED
    result = collect(plan)
    runs = ablation.parent.parent / "runs" / "scores"
    assert json.loads((runs / "ablation.json").read_text()) == json.loads(json.dumps(result))
    models = {name: variant["model"] for name, variant in result["variants"].items()}
    assert models == {"activation": "pruned", "random": "pruned", "two_rounds": "pruned", "trained": "distilled"}
    assert len({variant["parameters"] for variant in result["variants"].values()}) == 1
    seeds = [json.loads((runs / f"random-seed{seed}/evaluate/result.json").read_text())["models"]["pruned"] for seed in (1, 2)]
    kl = [seed["domains"]["in_domain"]["kl"]["value"] for seed in seeds]
    told = result["variants"]["random"]["figures"]["kl, in_domain"]
    assert (told["value"], told["spread"]) == pytest.approx((sum(kl) / 2, abs(kl[0] - kl[1]) / 2**0.5)) and kl[0] != kl[1]
    assert "kl, in_domain" in result["variants"]["two_rounds"]["figures"]  # the original teaches, not the round before
    assert "| trained (distilled) |" in (runs / "ablation.md").read_text()


def test_a_second_start_finds_everything_and_the_recipes_own_run_lends_what_it_has(ablation: Path) -> None:
    own = [str(ablation.parent.parent / "recipe.yaml"), ["prune.target.ffn=32"]]
    assert conductor.run_stages(["import", "data", "importance", "prune"], *own) == 0
    lent = list(STARTED)
    plan = planned(ablation)
    plan.trials[:] = plan.trials[:2]
    assert run_trials(plan) == 0
    assert STARTED[len(lent) :] == ["activation evaluate", "random-seed1 prune", "random-seed1 evaluate"]
    done = list(STARTED)
    assert run_trials(plan) == 0
    assert done == STARTED
    lender, taker = (ablation.parent.parent / "runs" / name / "prune" / "plan.json" for name in ("tiny", "scores/activation"))
    assert lender.samefile(taker)
