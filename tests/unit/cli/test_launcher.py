"""What launch/torchrun.sh makes of its environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_megatron import launcher
from minitron_megatron.errors import LayoutError

RECIPE = str(Path(__file__).resolve().parents[3] / "configs" / "smollm2_135m_to_97m.yaml")


def test_the_recipe_says_how_many_processes_and_nproc_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.torch.cuda, "device_count", lambda: 0)
    assert launcher.processes_here("distill", RECIPE, [], {}) == 2
    assert launcher.processes_here("distill", RECIPE, ["parallel.data=4"], {}) == 8
    assert launcher.processes_here("distill", RECIPE, ["parallel.data=4"], {"SLURM_NNODES": "2"}) == 4
    assert launcher.processes_here("distill", RECIPE, [], {"NPROC": "6"}) == 6


def test_a_stage_that_is_not_distributed_is_one_process() -> None:
    assert launcher.processes_here("prune", RECIPE, [], {"NPROC": "6"}) == 1


def test_a_node_with_gpus_takes_one_process_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.torch.cuda, "device_count", lambda: 8)
    assert launcher.processes_here("distill", RECIPE, [], {}) == 8


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
