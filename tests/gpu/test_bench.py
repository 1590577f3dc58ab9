"""What becomes of runs that fail, are cut off or take too long, and of claims about them: the table says so."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from . import bench as benches
from .bench import Bench, RunFailed, ended, environment_of, in_a_fresh_process, in_processes, last_words
from .claims import GROUPS
from .compare import distance, figure, share
from .ground import Ground
from .runs import carry_out
from .setting import Outcome, Run, Setting
from .table import printed, report
from .verdict import Claim, judge


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

    assert {verdict.why for verdict in judge(GROUPS["fp8"](Ground(tmp_path)), Bench(tmp_path, execute))} == {"house: no model here"}


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
    said = tmp_path / "output.txt"
    with said.open("w") as output:
        process = psutil.Popen(["sh", "-c", "sleep 60 & echo $!; wait"], stdout=output)
    while process.is_running() and not said.read_text().endswith("\n"):
        time.sleep(0.01)
    worker = int(said.read_text())
    assert ended(process, 0.1) is None
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
