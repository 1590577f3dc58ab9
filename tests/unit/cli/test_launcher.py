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
