"""The claims about a GPU, measured on a CPU and small: what measures them works, and the table says so where one does not hold."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from e2e.tiny_model import write_recipe
from safetensors.torch import save_file

from minitron_megatron.arch.source import source_architecture
from minitron_megatron.artifact import Artifact
from minitron_megatron.chain import STAGES, refuse_foreign_inputs, stage_settings
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.family import load_recipe
from minitron_megatron.config.schema import Recipe

from . import bench as benches
from .bench import Bench, RunFailed, ended, environment_of, in_a_fresh_process, in_processes, last_words
from .claims import GROUPS, Ground
from .compare import beyond, curve_distance, distance, figure, largest, mean_kl, other_steps, share
from .houses import ON_SMOLLM2, ROOT, SMOLLM2_RECIPE, House
from .measure import distillation
from .runs import carry_out
from .setting import Outcome, Run, Setting
from .table import printed, report
from .verdict import Claim, judge, table

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


def test_a_run_that_fails_fails_its_own_claims_and_says_why(tmp_path: Path) -> None:
    def execute(run: Run, folder: Path) -> None:
        if run.setting.fp8:
            raise RunFailed("no FP8 here")
        (folder / "result.json").write_text("{}")

    def claim(fp8: str) -> Claim:
        return Claim("any", f"with {fp8}", (Run.of("x", Setting("cpu", fp8=fp8)),), lambda outcomes: 0.0, 0, "")

    verdicts = judge([claim("delayed"), claim("")], Bench(tmp_path, execute, at_once=2))
    assert [(verdict.holds, verdict.why) for verdict in verdicts] == [(False, "no FP8 here"), (True, "")]
    assert [entry["holds"] for entry in report(["any"], verdicts)["claims"]] == [False, True]


def test_a_house_that_cannot_be_built_fails_what_lives_in_it(tmp_path: Path) -> None:
    def execute(run: Run, folder: Path) -> None:
        raise RunFailed(f"{run.kind}: no model here")

    assert {verdict.why for verdict in judge(GROUPS["fp8"](LITTLE), Bench(tmp_path, execute))} == {"house: no model here"}


@pytest.mark.parametrize("measured", [math.nan, math.inf, 1.0001])
def test_a_value_that_is_no_number_or_too_large_does_not_hold(measured: float, tmp_path: Path) -> None:
    bench = Bench(tmp_path, lambda run, folder: (folder / "result.json").write_text(json.dumps({"x": measured})) and None)
    assert not judge([Claim("any", "x", (Run.of("x", Setting("cpu")),), figure("x"), 1.0, "")], bench)[0].holds


def test_fp8_that_is_silently_off_does_not_hold(tmp_path: Path) -> None:
    """A linear in bf16 is far within FP8's bound, and a bf16 run beside itself is 0 apart."""
    figures = {"output": 3e-3, "input": 3e-3, "weight": 3e-3, "losses": [1.0] * 200, "scales_moved": 0.0}
    bench = Bench(tmp_path, lambda run, folder: written(folder, figures))
    linears, trained = GROUPS["first"](Ground(tmp_path)), GROUPS["fp8"](Ground(tmp_path))[:4]
    verdicts = judge([*linears, *trained, GROUPS["resume"](Ground(tmp_path))[1]], bench)
    assert len(verdicts) == 14 and [verdict.claim.name for verdict in verdicts if verdict.measured is None or verdict.holds] == []


def written(folder: Path, figures: object) -> None:
    (folder / "result.json").write_text(json.dumps(figures))


def test_a_result_that_was_cut_off_fails_its_own_claims(tmp_path: Path) -> None:
    def execute(run: Run, folder: Path) -> None:
        (folder / "result.json").write_text('{"x": 1' if run.kind == "half" else '{"x": 1, "nothing": 0}')

    def claim(kind: str, measure: Callable[[list[Outcome]], float]) -> Claim:
        return Claim("any", kind, (Run.of(kind, Setting("cpu")),), measure, 1, "")

    claims = [claim("half", figure("x")), claim("whole", figure("x")), claim("divides", share("x", "nothing")), claim("unsaved", distance("logits"))]
    verdicts = judge(claims, Bench(tmp_path, execute))
    assert [verdict.holds for verdict in verdicts] == [False, True, False, False]
    assert [word in verdict.why for verdict, word in zip(verdicts, ("JSONDecodeError", "", "ZeroDivisionError", "FileNotFoundError"), strict=True)]


def test_a_run_that_ends_while_it_writes_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(path: Path, text: str) -> None:
        path.open("w").write(text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        carry_out(Run.of("linear", Setting("cpu", "local")), tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_a_run_whose_time_is_over_takes_along_what_it_started(tmp_path: Path) -> None:
    """Its worker would keep the GPU, and this process waiting where it held a pipe."""
    with (tmp_path / "output.txt").open("w+") as output:
        process = psutil.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=output)
        assert ended(process, 0.5) is None
        output.seek(0)
        worker = int(output.read())
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE
    assert ended(psutil.Popen(["sh", "-c", "exit 3"]), 60) == 3


def test_no_run_begins_that_the_time_of_the_command_is_too_short_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "ENDS", time.monotonic() + 5)
    with pytest.raises(RunFailed, match="no time left; the same command goes on from here"):
        in_a_fresh_process(Run.of("linear", Setting("cpu", "local")), tmp_path)
    assert not list(tmp_path.iterdir())


def test_dynamo_that_is_off_in_these_tests_is_not_off_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of a CUDA run would not be compiled, and its memory and time would be others than a user's."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert "TORCHDYNAMO_DISABLE" not in environment_of(Run.of("loss", Setting("cuda")))


def test_a_measurement_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    outcome = in_processes(tmp_path).outcome(Run.of("linear", Setting("cpu", "local")))
    assert 0 < outcome.figures["output"] < 1e-2


def test_a_run_that_was_cut_off_begins_anew_and_one_that_is_finished_does_not(tmp_path: Path) -> None:
    run, begun = Run.of("x", Setting("cpu")), []

    def execute(run: Run, folder: Path) -> None:
        begun.append(sorted(path.name for path in folder.iterdir()))
        (folder / "result.json").write_text("{}")

    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / "half of it").touch()
    for _ in range(2):
        Bench(tmp_path, execute).outcome(run)
    assert begun == [[]]


def test_the_log_holds_what_each_run_said_once(tmp_path: Path) -> None:
    runs = [Run.of(kind, Setting("cpu")) for kind in ("said", "silent", "said")]
    (tmp_path / runs[0].name).mkdir()
    (tmp_path / runs[0].name / "output.txt").write_text("warmed up")
    assert printed(tmp_path, runs) == f"=== {runs[0].name}\nwarmed up"


def test_what_a_process_failed_of_is_told_without_its_traceback() -> None:
    told = "Traceback (most recent call last):\n  File ...\n    raise PlatformError(...)\nmodule.PlatformError: no GPU; use platform=cpu\n  more\n"
    assert last_words(told) == "module.PlatformError: no GPU; use platform=cpu"


def test_losses_that_are_off_in_one_window_are_seen(tmp_path: Path) -> None:
    losses = [2.0 - 0.01 * step for step in range(100)]
    off = [loss * (1.03 if step >= 80 else 1.0) for step, loss in enumerate(losses)]
    assert curve_distance(20)([Outcome({"losses": off}, tmp_path), Outcome({"losses": losses}, tmp_path)]) == pytest.approx(0.03)
    with pytest.raises(ValueError, match="100 and 99 steps"):
        curve_distance(20)([Outcome({"losses": off}, tmp_path), Outcome({"losses": losses[1:]}, tmp_path)])


@pytest.mark.parametrize("change", [{"losses": [1.0, 2.0000000000000004]}, {"norms": [3.0, 5.0]}, {"weights": "b"}])
def test_a_single_bit_of_a_resumed_run_is_seen(change: dict[str, object], tmp_path: Path) -> None:
    whole = {"losses": [1.0, 2.0], "norms": [3.0, 4.0], "weights": "a", "steps": [1, 2]}
    assert other_steps([Outcome(whole, tmp_path), Outcome(whole, tmp_path)]) == 0
    assert other_steps([Outcome({**whole, **change}, tmp_path), Outcome(whole, tmp_path)]) == 1


def test_kl_is_that_of_the_reference_to_the_other(tmp_path: Path) -> None:
    """By hand: KL([1/2, 1/2] ‖ [1/4, 3/4]) = ln 2 − ln(3) / 2."""
    folders = []
    for name, p in (("other", [0.25, 0.75]), ("reference", [0.5, 0.5])):
        (tmp_path / name).mkdir()
        save_file({"logits": torch.tensor([p, p]).log() + 3}, tmp_path / name / "tensors.safetensors")
        folders.append(Outcome({}, tmp_path / name))
    assert mean_kl(folders) == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)


def test_a_unit_that_changes_sides_counts_only_away_from_the_cut() -> None:
    expected = torch.tensor([4.0, 3.0, 2.99, 1.0])
    assert beyond(torch.tensor([4.0, 2.98, 2.99, 1.0]), expected, 1e-2) == 0  # 3.00 against 2.99 of 4: a quarter of a per cent
    assert beyond(torch.tensor([4.0, 2.98, 2.99, 3.5]), expected, 1e-2) == 1  # the last, half of the largest score away


@pytest.mark.parametrize("found", [[math.nan] * 4, [4.0, 3.0, math.nan, 1.0], [math.inf, 3.0, 2.0, 1.0]])
def test_scores_that_are_no_numbers_pass_no_claim(found: list[float]) -> None:
    expected = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert beyond(torch.tensor(found), expected, 1e-2) > 0 and beyond(expected, torch.tensor(found), 1e-2) > 0
    assert math.isnan(largest([0.0, math.nan])) and math.isnan(largest([math.nan, 0.0]))
