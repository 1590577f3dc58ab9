"""The claims about a GPU, measured on a CPU and small: what measures them works, and what a GPU will be given is accepted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from e2e.tiny_model import write_recipe

from minitron_megatron.arch.source import source_architecture
from minitron_megatron.artifact import Artifact
from minitron_megatron.chain import STAGES, refuse_foreign_inputs, stage_settings
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.family import load_recipe
from minitron_megatron.config.schema import Recipe

from .bench import Bench
from .claims import GROUPS
from .ground import Ground
from .houses import ON_SMOLLM2, ROOT, SMOLLM2_RECIPE, House
from .measure import distillation
from .runs import carry_out
from .setting import Setting
from .verdict import judge, table

LITTLE = Ground(
    Path("nowhere"),
    device="cpu",
    samples=4,
    length=32,
    steps=4,
    window=2,
    resumed_steps=4,
    training=("distill.global_batch=4", "distill.micro_batch=2", "distill.sequence_length=32"),
    layers=1,
    big="smollm2_135m",
    loss_size=(64, 32, 515),
    loss_peak_size=(2048, 64, 8192),
    loss_peak_mib=96,
)
SMALLER = "memory"
"""A CPU rounds to FP8 and computes in bf16: nothing becomes smaller."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), carry_out)


@pytest.fixture(scope="module")
def ground(bench: Bench) -> Ground:
    return replace(LITTLE, folder=bench.folder)


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "smollm2"])
def test_every_group_is_measured_on_a_cpu(group: str, ground: Ground, bench: Bench) -> None:
    verdicts = judge(GROUPS[group](ground), bench)
    assert verdicts
    assert all(verdict.measured is not None and math.isfinite(verdict.measured) for verdict in verdicts), table(verdicts)
    assert all(verdict.holds for verdict in verdicts) == (group != SMALLER), table(verdicts)


def test_fp8_that_is_emulated_changes_losses_and_logits(ground: Ground, bench: Bench) -> None:
    """Or the claims would compare bf16 with itself."""
    assert all(verdict.measured for verdict in judge(GROUPS["fp8"](ground), bench))


def test_memory_that_fp8_does_not_save_does_not_hold(ground: Ground, bench: Bench) -> None:
    verdicts = judge(GROUPS["memory"](ground), bench)
    assert [verdict.measured for verdict in verdicts] == [1.0] * len(verdicts)
    assert not any(verdict.holds for verdict in verdicts)
    assert "0 of 4 claims hold" in table(verdicts)


def test_smollm2_is_not_asked_for_blockwise_scaling(ground: Ground) -> None:
    """Its 576 channels are no multiple of 128."""
    runs = {run for claim in GROUPS["smollm2"](replace(ground, device="cuda")) for run in claim.needs()}
    assert {run.setting.fp8 for run in runs} == {"", "delayed", "tensorwise"}
    assert not any("blockwise" in run.given for run in runs)


def test_every_recipe_that_a_gpu_will_be_given_is_accepted(ground: Ground, bench: Bench) -> None:
    """With what the whole of the claims trains, not the little that a CPU does."""
    small = House(bench.outcome(ground.house).folder)
    real = source_architecture("nowhere", str(ROOT / "configs" / "architectures" / "smollm2_135m.json"))
    houses = {"small": (small.recipe_path, small.overrides, small.architecture()), "smollm2": (str(SMOLLM2_RECIPE), ON_SMOLLM2, real)}
    wanted = Ground(ground.folder)
    runs = {run: "small" for group in ("fp8", "resume") for claim in GROUPS[group](wanted) for run in claim.runs if run.kind == "distill"}
    runs |= {run: "smollm2" for claim in GROUPS["smollm2"](wanted) for run in claim.runs if run.kind == "distill"}
    assert {(house, run.setting.fp8) for run, house in runs.items()} >= {("small", "blockwise"), ("smollm2", "delayed")}
    for run, house in runs.items():
        path, overrides, source = houses[house]
        given = {name: value for name, value in json.loads(run.given).items() if name in ("steps", "overrides", "teacher")}
        changes = [*overrides, "platform=cuda", "precision=bf16", *distillation.recipe_changes(run.setting, **given)]
        check_recipe(load_recipe(path, changes), source)


def test_an_fp8_student_is_cut_under_the_name_that_its_distillation_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8's kernels ask for multiples, which are a part of prune's identity; an emulation asks for none, so that nothing else here would see it."""
    house = house_of_a_recipe_alone(tmp_path / "house")
    cut: dict[Path, Recipe] = {}

    def stage(self: House, name: str, setting: Setting, *overrides: str) -> None:
        recipe = load_recipe(self.recipe_path, [*self.overrides, f"platform={setting.device}", *overrides])
        if name == "prune":
            cut[self.folder] = recipe
            return
        pruned = stage_settings(STAGES["prune"], cut.get(self.folder, house.recipe()))
        refuse_foreign_inputs({"prune": Artifact(self.artifacts / "prune", {"settings": pruned, "inputs": {}})}, recipe, self.recipe_path)
        (self.artifacts / "distill").mkdir()
        (self.artifacts / "distill" / "metrics.jsonl").touch()
        (self.artifacts / "distill" / "result.json").write_text('{"weights_sha256": ""}')

    monkeypatch.setattr(House, "stage", stage)
    claims = [claim for group in ("fp8", "resume") for claim in GROUPS[group](Ground(tmp_path))]
    runs = {run for claim in claims for run in claim.runs if run.kind == "distill" and "pauses" not in run.given}
    assert {run.setting.fp8 for run in runs} == {"", "delayed", "tensorwise", "blockwise"}
    for run in runs:
        (tmp_path / run.name).mkdir()
        distillation.distilled(run.setting, tmp_path / run.name, **json.loads(run.given) | {"house": str(house.folder)})


def house_of_a_recipe_alone(folder: Path) -> House:
    folder.mkdir()
    write_recipe(folder)
    (folder / "overrides.json").write_text(json.dumps(["parallel.pipeline=1"]))
    (folder / "runs" / "tiny").mkdir(parents=True)
    return House(folder)
