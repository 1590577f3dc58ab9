"""status.json, the environment in the manifest, and the health check."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import pytest

from minitron_megatron import environment, health, status
from minitron_megatron.errors import PlatformError


def test_a_stage_that_works_anew_is_told_of_before_what_an_older_one_published(tmp_path: Path) -> None:
    assert status.told(tmp_path, "distill") == {}
    for folder, state in (("distill", "finished"), (".distill.partial", "running")):
        (tmp_path / folder).mkdir()
        status.tell(tmp_path / folder, state)  # type: ignore[arg-type]
        assert status.told(tmp_path, "distill")["state"] == state


def test_nothing_is_written_where_a_mistake_left_no_folder(tmp_path: Path) -> None:
    status.tell(tmp_path / "gone", "failed", why="…")
    assert list(tmp_path.iterdir()) == []


def test_a_job_with_nothing_to_do_takes_its_status_back_and_leaves_work_of_others(tmp_path: Path) -> None:
    for name in ("empty", "work"):
        (tmp_path / name).mkdir()
        status.tell(tmp_path / name, "queued", job="7")
    (tmp_path / "work" / "block").touch()
    for name in ("empty", "work", "not there"):
        status.withdraw(tmp_path / name)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["work", "work/block"]


def test_a_new_start_keeps_what_is_known_of_steps(tmp_path: Path) -> None:
    status.tell(tmp_path, "saved", step=5, steps=60, saved_step=5, why="it was asked to stop")
    status.tell(tmp_path, "running", **status.steps_of(tmp_path))
    told = status.read(tmp_path)
    assert (told["state"], told["step"], told["steps"], told["saved_step"]) == ("running", 5, 60, 5) and "why" not in told


def test_steps_are_told_once_a_second_and_saved_ones_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    steps, seen = status.StepStatus(tmp_path, 60), []
    for step in range(1, 6):
        steps.step(step, lambda: 2)
        seen.append(json.loads((tmp_path / "status.json").read_text())["step"])
        now[0] += 0.4
    assert seen == [1, 1, 1, 4, 4]
    steps.saved(5, "it was asked to stop")
    told = json.loads((tmp_path / "status.json").read_text())
    assert (told["state"], told["step"], told["saved_step"], told["why"]) == ("saved", 5, 5, "it was asked to stop")


def test_the_manifest_gets_what_shapes_a_run_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "3", "THP_MEM_ALLOC_ENABLE": "1", "SLURM_JOB_ID": "7"}
    values = {**kept, "NCCL_API_KEY": "x", "HF_TOKEN": "x", "HOME": "/root"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    found = environment.recorded()["variables"]
    assert {name: value for name, value in found.items() if name in values} == kept


Usage, Memory = namedtuple("Usage", "total used free"), namedtuple("Memory", "available")


def test_every_problem_of_a_node_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health.torch.cuda, "device_count", lambda: 7)
    monkeypatch.setattr(health, "_free_gib_of_gpus", lambda: [79.0, 11.5])
    monkeypatch.setattr(health.shutil, "disk_usage", lambda path: Usage(0, 0, 9e9))
    monkeypatch.setattr(health.psutil, "virtual_memory", lambda: Memory(3 * 2**30))
    wanted = {health.GPUS: "8", health.GPU_FREE: "70", health.DISK_FREE: "10", health.MEMORY_FREE: "4"}
    with pytest.raises(PlatformError) as told:
        health.require_health(tmp_path / "not" / "there", wanted)
    for problem in ("7 GPUs, 8 are", "GPU 1 has 11.5 GiB free, 70 are", "9.0 GB free, 10 are", "3.0 GiB of memory are free, 4 are"):
        assert problem in str(told.value)
    assert "GPU 0" not in str(told.value)
    health.require_health(tmp_path, {})  # what is not asked for is not looked at
    health.require_health(tmp_path, {health.GPUS: "7", health.GPU_FREE: "11", health.DISK_FREE: "8", health.MEMORY_FREE: "2.5"})


def test_a_node_without_a_driver_says_how_many_gpus_it_lacks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlatformError, match=r"0 GPUs, 8 are asked for; nvidia-smi does not answer.*take the node out"):
        health.require_health(tmp_path, {health.GPUS: "8", health.GPU_FREE: "70"})


def test_a_threshold_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="MINITRON_HEALTH_DISK_FREE_GB=much is no number"):
        health.require_health(tmp_path, {health.DISK_FREE: "much"})
