"""What launch/torchrun.sh makes of its environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from minitron_megatron import launcher
from minitron_megatron.errors import LayoutError

RECIPE = str(Path(__file__).resolve().parents[3] / "configs" / "smollm2_135m_to_97m.yaml")


def test_the_recipe_says_how_many_processes_and_nproc_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.torch.cuda, "device_count", lambda: 0)
    assert launcher.processes_here(RECIPE, [], {}) == 2
    assert launcher.processes_here(RECIPE, ["parallel.data=4"], {}) == 8
    assert launcher.processes_here(RECIPE, ["parallel.data=4"], {"SLURM_NNODES": "2"}) == 4
    assert launcher.processes_here(RECIPE, [], {"NPROC": "6"}) == 6


def test_a_number_of_processes_that_is_none_is_refused() -> None:
    with pytest.raises(LayoutError, match="NPROC=two is no whole number"):
        launcher.processes_here(RECIPE, [], {"NPROC": "two"})


@pytest.fixture(autouse=True)
def _environment_as_before() -> Iterator[None]:
    """launch() sets this process's own, which the tests of other files hand on to theirs."""
    with mock.patch.dict(os.environ):
        yield


def test_a_launch_leaves_no_folder_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun makes one for errors at each start."""
    folders: list[Path] = []

    def run(arguments: argparse.Namespace) -> None:
        folders.append(Path(arguments.log_dir))
        assert folders[0].is_dir()

    monkeypatch.setattr(launcher.torchrun, "run", run)
    assert launcher.launch("import", RECIPE, [], 1) == 0
    assert not folders[0].exists()


def test_threads_of_a_stage_do_not_depend_on_the_stages_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`minitron run` launches one process, then two: the second must not find the first one's threads in the environment."""
    monkeypatch.setattr(launcher.environment, "USER_ENVIRONMENT", {})
    monkeypatch.setattr(launcher.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(launcher.torchrun, "run", lambda arguments: seen.append(launcher.os.environ["OMP_NUM_THREADS"]))
    seen: list[str] = []
    for processes in (1, 2, 8, 1):
        assert launcher.launch("import", RECIPE, [], processes) == 0
    assert seen == ["8", "4", "1", "8"]


def test_what_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.environment, "USER_ENVIRONMENT", {"OMP_NUM_THREADS": "3"})
    assert launcher.worker_environment(2)["OMP_NUM_THREADS"] == "3"


def test_a_stream_gives_each_large_tensor_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the heap, where training has them, holes made a stream's memory several times what it holds (benchmarks/prune_memory.py)."""
    monkeypatch.setattr(launcher.environment, "USER_ENVIRONMENT", {})
    monkeypatch.setattr(launcher.torchrun, "run", lambda arguments: seen.append(launcher.os.environ["MALLOC_MMAP_MAX_"] != "0"))
    seen: list[bool] = []
    for stage in ("distill", "prune", "distill"):
        assert launcher.launch(stage, RECIPE, [], 1) == 0
    assert seen == [False, True, False]


def test_a_node_with_gpus_takes_one_process_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.torch.cuda, "device_count", lambda: 8)
    assert launcher.processes_here(RECIPE, [], {}) == 8


def test_one_node_finds_its_own_port_and_several_meet_at_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.rendezvous({}) == ("--standalone",)
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "31234", "MASTER_ADDR": "node1"}
    assert launcher.rendezvous(slurm) == ("--nnodes=2", "--node-rank=1", "--master-addr=node1", "--master-port=21234")
    with pytest.raises(LayoutError, match="MASTER_ADDR is not set"):
        launcher.rendezvous({"SLURM_NNODES": "2"})


def test_an_unknown_stage_is_one_line_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["distil", RECIPE]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "importance" in error


def test_workers_are_told_the_id_of_their_own_launcher_and_not_of_one_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By it they know whether their parent lives; with another launcher's id each would take itself for an orphan and leave."""
    monkeypatch.setattr(launcher.environment, "USER_ENVIRONMENT", {launcher.LAUNCHED: "1"})
    assert launcher.worker_environment(2)[launcher.LAUNCHED] == str(os.getpid())


def test_data_parallelism_takes_what_the_nodes_have_unless_it_is_named() -> None:
    assert launcher.filled(RECIPE, [], 8) == ["parallel.data=4"]  # two stages of a pipeline
    assert launcher.filled(RECIPE, ["parallel.data=1"], 8) == ["parallel.data=1"]
    with pytest.raises(LayoutError, match="7 processes are no multiple of the 2"):
        launcher.filled(RECIPE, [], 7)


@pytest.mark.parametrize(
    ("codes", "saved", "starts"),
    [
        ([1, 1, 0], [0, 0, 0, 0, 0, 0], 3),
        ([1, 1, 1, 1], [0] * 8, 3),  # two restarts, then it is given up
        ([1, 1, 1, 1, 0], [0, 0, 0, 5, 5, 5, 5, 9, 9, 9], 5),  # a new checkpoint counts them anew
        ([2, 0], [0] * 4, 1),  # what the user has to mend
        ([75, 0], [0] * 4, 1),  # it was asked to stop
    ],
)
def test_processes_that_died_are_started_again_as_long_as_they_get_further(
    monkeypatch: pytest.MonkeyPatch, codes: list[int], saved: list[int], starts: int
) -> None:
    left, steps, seen = list(codes), list(saved), []
    monkeypatch.setattr(launcher, "saved_step", lambda folder, stage: steps.pop(0))
    monkeypatch.setattr(launcher, "launch", lambda *arguments: seen.append(arguments) or left.pop(0))
    assert launcher._launch_again("distill", RECIPE, [], 2, ("--standalone",), 2) == codes[starts - 1]
    assert len(seen) == starts


def test_restarts_over_several_nodes_are_slurms_business(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"SLURM_NNODES": "2", "MASTER_ADDR": "node1", "NPROC": "2"}.items():
        monkeypatch.setenv(name, value)
    assert launcher.main(["--restarts=2", "distill", RECIPE]) == 2
    assert "--restarts is for one node" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--restart=2", "--restarts=two", "--restarts"])
def test_an_unknown_option_is_one_line(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main([option, "distill", RECIPE]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{option}: no such option; usage: launch/torchrun.sh") and error.count("\n") == 1


def test_what_failed_is_told_in_the_status_and_a_consequence_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ".distill.partial"
    launcher._tell_failure(folder, "a mistake")
    assert not folder.exists()  # outside of jobs a mistake leaves nothing behind
    monkeypatch.setenv(launcher.JOB, str(tmp_path))
    launcher._tell_failure(folder, "rank 3 was killed")
    launcher._tell_failure(folder, "another process was gone", consequence=True)
    found = launcher.read(folder)
    assert (found["state"], found["why"]) == ("failed", "rank 3 was killed")


def test_without_restarts_nothing_is_started_again_however_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """On several nodes SLURM starts the whole job again: one node alone would wait for the others."""
    steps, seen = [0, 50], []
    monkeypatch.setattr(launcher, "saved_step", lambda folder, stage: steps.pop(0))
    monkeypatch.setattr(launcher, "launch", lambda *arguments: seen.append(arguments) or 1)
    assert launcher._launch_again("distill", RECIPE, [], 2, ("--standalone",), 0) == 1
    assert len(seen) == 1


def test_the_newest_whole_checkpoint_counts_as_saved(tmp_path: Path) -> None:
    """Not what a status told, which a start that dies early has overwritten."""
    training = tmp_path / ".distill.partial" / "training"
    assert launcher.saved_step(tmp_path, "distill") == 0
    for name in ("step_00000020", "step_00000100", "writing_00000120_1a"):
        (training / name).mkdir(parents=True)
    assert launcher.saved_step(tmp_path, "distill") == 100
