"""Chains of jobs: so many at a time, one after the other within a chain, all ended where one fails."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from minitron_megatron.errors import LayoutError, TrainingError
from minitron_megatron.search import jobs
from minitron_megatron.search.jobs import Job, Place, places, run_chains

TALK = "import sys, time; print(*sys.argv[1:], time.monotonic()); sys.stdout.flush(); time.sleep(0.15); print('end', time.monotonic())"
FAIL = "import sys; print('some words'); sys.exit('recipe.yaml: distill.steps is wrong')"
SLEEP_OR_FAIL = "import sys, time; time.sleep(30) if sys.argv[3].endswith('long') else sys.exit('it fell over')"


def chains(folder: Path, count: int) -> list[list[Job]]:
    return [[Job(verb, folder / f"{number}.yaml", folder / f"{number}.log") for verb in ("prune", "distill")] for number in range(count)]


def spans(log: Path) -> list[tuple[float, float]]:
    lines = log.read_text().split("\n")
    return [(float(lines[at].split()[-1]), float(lines[at + 1].split()[-1])) for at in range(0, len(lines) - 1, 2)]


def test_two_at_a_time_and_in_order_within_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PROGRAM", TALK)
    done: list[int] = []
    run_chains(chains(tmp_path, 4), [Place(1), Place(1)], done.append)
    found = [spans(tmp_path / f"{number}.log") for number in range(4)]
    assert sorted(done) == [0, 1, 2, 3]
    assert all(prune[1] <= distill[0] for prune, distill in found)
    moments = [begin for chain in found for begin, _ in chain]
    together = [sum(begin <= moment < end for chain in found for begin, end in chain) for moment in moments]
    assert max(together) == 2


def test_a_failed_job_is_told_with_its_last_words_and_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PROGRAM", SLEEP_OR_FAIL)
    long, short = (Job("distill", tmp_path / name, tmp_path / f"{name}.log") for name in ("long", "short"))
    began = time.monotonic()
    with pytest.raises(TrainingError, match=r"`minitron distill .*short` failed: it fell over \(all it said: .*short.log\)") as caught:
        run_chains([[long], [short]], [Place(1), Place(1)], lambda number: None)
    assert caught.value.keeps_work
    assert time.monotonic() - began < 15
    assert not [child for child in psutil.Process().children() if "long" in " ".join(child.cmdline())]


def test_a_user_s_mistake_in_a_job_is_its_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PROGRAM", FAIL)
    with pytest.raises(TrainingError, match=r"recipe.yaml: distill.steps is wrong"):
        run_chains(chains(tmp_path, 1), [Place(1)], lambda number: None)


def test_jobs_do_not_take_the_search_s_own_process_group_for_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PROGRAM", "import os; print(sorted(name for name in os.environ if 'RANK' in name or 'TORCHEL' in name))")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    run_chains([[Job("prune", tmp_path / "x", tmp_path / "log")]], [Place(1)], lambda number: None)
    assert (tmp_path / "log").read_text() == "[]\n"


def test_gpus_are_dealt_out_and_too_few_of_them_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    assert [place.devices for place in places(2, 2, platform="cuda")] == ["4,5", "6,7"]
    with pytest.raises(LayoutError, match=r"search.jobs=3 candidates × 2 processes need 6 GPUs, there are 5; set search.jobs=2"):
        places(3, 2, platform="cuda")


def test_cores_are_shared_out_unless_somebody_has_said_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert places(2, 2, platform="cpu") == [Place(4), Place(4)]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert places(2, 2, platform="cpu") == [Place(3), Place(3)]
