"""A tiny model's chain as SLURM jobs over two nodes, and what disturbs one: limits, signals, killed processes, lost nodes, mistakes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import REPOSITORY, Cluster, wait_until

pytestmark = pytest.mark.slow

STEPS, SAVED_EVERY = 80, 20
TRAINING = (f"distill.steps={STEPS}", f"distill.save_every_steps={SAVED_EVERY}", "distill.validate_every_steps=40")
FIRST, SECOND = "step_00000020", "step_00000040"
CPU = REPOSITORY / "configs" / "cluster" / "cpu.yaml"


@dataclass(frozen=True)
class Run:
    """What a pipeline left."""

    jobs: dict[str, int]
    folder: Path
    """runs/NAME"""
    queued: dict[str, dict[str, Any]]
    """status.json of each stage as soon as its job was submitted."""

    def result(self, stage: str) -> dict[str, Any]:
        return json.loads((self.folder / stage / "result.json").read_text())

    def manifest(self, stage: str) -> dict[str, Any]:
        return json.loads((self.folder / stage / "manifest.json").read_text())


def pipeline(cluster: Cluster, recipe: Path, *overrides: str) -> dict[str, int]:
    """Ids of the jobs by stage."""
    printed = cluster.run("slurm/pipeline_8b_to_4b.sh", str(recipe), *overrides, SBATCH_ARGS="--nodes=2 --time=01:00:00")
    return {stage: int(job) for stage, job in (line.split() for line in printed.splitlines())}


def status_in(folder: Path) -> dict[str, Any]:
    file = folder / "status.json"
    return json.loads(file.read_text()) if file.is_file() else {}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, recipe: Path) -> Run:
    folder = recipe.parent / "runs" / "tiny"
    jobs = pipeline(cluster, recipe, *TRAINING)
    queued = {stage: status_in(folder / f".{stage}.partial") for stage in jobs}
    for job in jobs.values():
        cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    told = {stage: cluster.log(job) for stage, job in jobs.items() if cluster.facts(job)["JobState"] != "COMPLETED"}
    assert not told, "\n".join(f"{stage}: {log}" for stage, log in told.items())
    return Run(jobs, folder, queued)


def test_the_chain_runs_in_the_order_of_its_stages(undisturbed: Run) -> None:
    assert list(undisturbed.jobs) == ["import", "data", "importance", "prune", "distill", "evaluate", "export", "report"]
    for stage in undisturbed.jobs:
        assert status_in(undisturbed.folder / stage)["state"] == "finished"
    assert not [path.name for path in undisturbed.folder.iterdir() if path.name.startswith(".")]


def test_a_stage_that_waits_says_so(undisturbed: Run) -> None:
    for stage in ("prune", "distill", "evaluate", "export", "report"):  # those before may have begun by the time that the test looks
        assert (undisturbed.queued[stage]["state"], undisturbed.queued[stage]["job"]) == ("queued", str(undisturbed.jobs[stage]))


def test_the_manifest_tells_of_job_nodes_and_environment(undisturbed: Run) -> None:
    manifest = undisturbed.manifest("distill")
    assert manifest["layout"]["processes"] == 4 and manifest["layout"]["data"] == 2
    variables = manifest["environment"]["variables"]
    assert variables["SLURM_JOB_ID"] == str(undisturbed.jobs["distill"])
    assert variables["SLURM_JOB_NODELIST"] == "node[1-2]"
    assert variables["OMP_NUM_THREADS"] == "1"  # by the cluster file


def test_rank_0_is_on_the_console_and_each_other_rank_has_a_log(cluster: Cluster, undisturbed: Run) -> None:
    job = undisturbed.jobs["distill"]
    assert f"distill {STEPS}/{STEPS}" in cluster.log(job)
    assert re.search(r"health: all-reduce over 4 processes \d+\.\d\d GB/s", cluster.log(job))
    assert [path.name for path in sorted((cluster.folder / "logs" / f"distill-{job}").glob("rank_*"))] == [f"rank_0000{n}.log" for n in (1, 2, 3)]


def test_what_is_up_to_date_is_not_submitted_and_a_job_that_finds_it_so_leaves_nothing(cluster: Cluster, recipe: Path, undisturbed: Run) -> None:
    assert "everything is up to date" in cluster.run("slurm/pipeline_8b_to_4b.sh", str(recipe), *TRAINING)
    waiting = undisturbed.folder / ".import.partial"
    waiting.mkdir()
    (waiting / "status.json").write_text('{"state": "queued"}\n')
    job = cluster.submit("import", str(recipe), options=("--time=01:00:00",))
    cluster.wait(job)
    assert "import: up to date" in cluster.log(job) and not waiting.exists()


@dataclass
class Disturbed:
    """A distillation of its own, from the artifacts of the undisturbed run."""

    cluster: Cluster
    recipe: Path
    folder: Path

    def submit(self, *overrides: str, options: tuple[str, ...] = ("--time=01:00:00",), **environment: str) -> int:
        """By the script for Llama-3.1, with another recipe; HOLD and DIES: what site/sitecustomize.py does."""
        environment["PYTHONPATH"] = str(Path(__file__).with_name("site"))
        arguments = (str(self.recipe), *TRAINING, f"runs={self.folder.parent}", *overrides)
        return self.cluster.submit("distill_8b_to_4b", *arguments, options=options, **environment)

    @property
    def partial(self) -> Path:
        return self.folder / ".distill.partial"

    def wait_for_checkpoint(self, job: int, name: str) -> None:
        wait_until((self.partial / "training" / name).is_dir, lambda: f"{status_in(self.partial)}\n{self.cluster.log(job)}")

    def wait_for_restarts(self, job: int, number: int) -> None:
        wait_until(lambda: self.cluster.facts(job)["Restarts"] == str(number), lambda: self.cluster.log(job))

    def workers(self, node: int) -> list[psutil.Process]:
        """Of the job that runs, on a node that is this machine like the other."""
        workers = []
        for process in psutil.process_iter():
            try:
                variables = process.environ() if "minitron_megatron.worker" in process.cmdline() else {}
            except psutil.Error:
                continue
            ours = variables.get("SLURM_CONF") == self.cluster.environment["SLURM_CONF"]
            if ours and variables.get("SLURM_NODEID") == str(node) and "RANK" in variables:
                workers.append(process)
        return sorted(workers, key=lambda process: int(process.environ()["RANK"]))

    def lose(self, job: int, victims: list[psutil.Process]) -> None:
        """The slurmd of the second node and the victims, until SLURM has queued the job again; then the node is there again."""
        os.kill(self.cluster.slurmd(2), signal.SIGKILL)
        try:
            for process in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            wait_until(lambda: "down" in " ".join(self.cluster.nodes()), lambda: str(self.cluster.nodes()))
            wait_until(lambda: self.cluster.facts(job)["JobState"] == "PENDING", lambda: str(self.cluster.facts(job)))
            wait_until(lambda: status_in(self.partial)["state"] in ("queued", "saved"), lambda: str(status_in(self.partial)))
        finally:
            self.cluster.start_slurmd(2)

    def require_the_same_end(self, undisturbed: Run) -> None:
        """To the bit, and each step once: no sample lost, none repeated."""
        found, expected = json.loads((self.folder / "distill" / "result.json").read_text()), undisturbed.result("distill")
        for name in ("weights_sha256", "validation", "tokens"):
            assert found[name] == expected[name]
        metrics = [json.loads(line) for line in (self.folder / "distill" / "metrics.jsonl").read_text().splitlines()]
        straight = [json.loads(line) for line in (undisturbed.folder / "distill" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in metrics] == list(range(STEPS + 1))
        assert [line.get("loss") for line in metrics] == [line.get("loss") for line in straight]


@pytest.fixture
def disturbed(cluster: Cluster, recipe: Path, undisturbed: Run, tmp_path: Path) -> Iterator[Disturbed]:
    folder = tmp_path / "runs" / "tiny"
    for stage in ("import", "data", "importance", "prune"):
        shutil.copytree(undisturbed.folder / stage, folder / stage)
    yield Disturbed(cluster, recipe, folder)
    cluster.clear()


def saved_steps(log: str) -> list[int]:
    """Behind which step each start that was asked to stop has saved."""
    return [int(step) for step in re.findall(rf"distill: asked to stop: saved behind step (\d+) of {STEPS}", log)]


def continued_steps(log: str) -> list[int]:
    """Behind which step each start but the first has gone on."""
    return [int(step) for step in re.findall(rf"distill: continues behind step (\d+) of {STEPS}", log)]


def test_a_time_limit_is_met_with_a_checkpoint_and_the_run_ends_in_the_same_bits(disturbed: Disturbed, undisturbed: Run) -> None:
    """SLURM looks twice a minute whose limit is near, and may ask before the first step: the first start waits for it, the second has an hour."""
    job = disturbed.submit(options=("--time=00:05:00", "--signal=B:USR1@285"), HOLD=f"0:{FIRST}")
    disturbed.wait_for_restarts(job, 1)
    disturbed.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=01:00:00")
    facts, log = disturbed.cluster.wait(job), disturbed.cluster.log(job)
    assert facts["Restarts"] == "1" and "SIGUSR1: the step is asked to save and to stop" in log
    assert len(saved_steps(log)) == 1 and 0 < saved_steps(log)[0] < STEPS
    assert continued_steps(log) == saved_steps(log)
    disturbed.require_the_same_end(undisturbed)


def test_a_term_signal_and_a_killed_rank_are_overcome_in_one_job(disturbed: Disturbed, undisturbed: Run) -> None:
    job = disturbed.submit("training.asynchronous_checkpoints=false", HOLD=f"0:{FIRST} 1:{SECOND}")
    disturbed.wait_for_checkpoint(job, FIRST)
    disturbed.cluster.run("scancel", "--signal=TERM", str(job))
    disturbed.wait_for_restarts(job, 1)
    assert status_in(disturbed.partial)["state"] in ("queued", "running")
    disturbed.wait_for_checkpoint(job, SECOND)
    disturbed.workers(1)[-1].send_signal(signal.SIGKILL)
    disturbed.wait_for_restarts(job, 2)
    disturbed.cluster.wait(job)
    log = disturbed.cluster.log(job)
    assert re.search(r"queued again \(job \d+\): distill: rank 3 was killed by signal 9 \(SIGKILL\)", log)
    assert len(saved_steps(log)) == 1 and SAVED_EVERY <= saved_steps(log)[0] < 2 * SAVED_EVERY
    assert continued_steps(log) == [*saved_steps(log), 2 * SAVED_EVERY]  # what was killed lost no more than what came behind its checkpoint
    disturbed.require_the_same_end(undisturbed)


def test_a_pre_emption_is_met_with_a_checkpoint(disturbed: Disturbed, undisturbed: Run) -> None:
    """SLURM sends SIGTERM by itself as a job of a partition before ours wants the nodes."""
    job = disturbed.submit(HOLD=f"0:{FIRST}")
    disturbed.wait_for_checkpoint(job, FIRST)
    options = ("--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    urgent = int(disturbed.cluster.run("sbatch", *options))
    disturbed.cluster.wait(urgent)
    facts, log = disturbed.cluster.wait(job), disturbed.cluster.log(job)
    assert facts["Restarts"] == "1"
    assert saved_steps(log) == continued_steps(log) and saved_steps(log)[0] >= SAVED_EVERY
    disturbed.require_the_same_end(undisturbed)


def test_lost_nodes_are_waited_for_and_the_run_goes_on(disturbed: Disturbed, undisturbed: Run) -> None:
    """First a slurmd alone, where what ran on its node lives on until SLURM gives the node up; then a node with all that ran there."""
    job = disturbed.submit("training.asynchronous_checkpoints=false", HOLD=f"0:{FIRST} 1:{SECOND}")
    disturbed.wait_for_checkpoint(job, FIRST)
    disturbed.lose(job, [])
    disturbed.wait_for_checkpoint(job, SECOND)
    workers = disturbed.workers(1)
    victims = [*workers, *{parent for worker in workers for parent in worker.parents() if parent.name() == "slurmstepd"}]
    assert len(victims) == 3
    disturbed.lose(job, victims)
    assert disturbed.cluster.wait(job)["Restarts"] == "2"
    saved, later = continued_steps(disturbed.cluster.log(job))
    assert SAVED_EVERY <= saved < later == 2 * SAVED_EVERY
    disturbed.require_the_same_end(undisturbed)


def test_a_job_that_its_user_cancels_stays_ended_and_keeps_what_it_saved(disturbed: Disturbed) -> None:
    job = disturbed.submit(HOLD=f"0:{FIRST}")
    disturbed.wait_for_checkpoint(job, FIRST)
    disturbed.cluster.run("scancel", str(job))
    assert disturbed.cluster.wait(job, "CANCELLED", "PENDING")["JobState"] == "CANCELLED"
    told = status_in(disturbed.partial)
    assert (told["state"], told["why"]) == ("failed", "the job was cancelled; what it saved is kept")
    assert (disturbed.partial / "training" / FIRST).is_dir()


def test_a_failed_stage_stops_the_chain_with_its_reason(cluster: Cluster, disturbed: Disturbed) -> None:
    """A loss that is not finite would be so again: no second start."""
    jobs = pipeline(cluster, disturbed.recipe, *TRAINING, f"runs={disturbed.folder.parent}", "distill.learning_rate.peak=1e30")
    assert list(jobs) == ["distill", "evaluate", "export", "report"]
    facts = cluster.wait(jobs["distill"], "FAILED", "COMPLETED", "CANCELLED")
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("FAILED", "0", "2:0")
    assert status_in(disturbed.partial)["state"] == "failed"
    assert re.search(r"step \d+ has loss (nan|inf)|gradient norm (nan|inf)", status_in(disturbed.partial)["why"])
    for stage in ("evaluate", "export", "report"):
        assert cluster.wait(jobs[stage], "CANCELLED")["Restarts"] == "0"
        told = status_in(disturbed.folder / f".{stage}.partial")
        assert (told["state"], told["why"], told["job"]) == ("failed", "stage distill before it failed", str(jobs[stage]))


def test_a_node_that_fails_the_health_check_stops_the_job_with_its_reason(disturbed: Disturbed, tmp_path: Path) -> None:
    poor = tmp_path / "cluster.yaml"
    poor.write_text(CPU.read_text().replace("memory_free_gib: 0.1", "memory_free_gib: 1000000"))
    job = disturbed.submit(CLUSTER=str(poor))
    facts = disturbed.cluster.wait(job, "FAILED", "COMPLETED")
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("FAILED", "0", "2:0")
    assert re.match(r"health check of node node[12]: .* GiB of memory are free, 1e\+06 are asked for", status_in(disturbed.partial)["why"])


def test_a_job_that_gets_no_further_is_given_up(disturbed: Disturbed, tmp_path: Path) -> None:
    """Each start dies before it has saved anything."""
    impatient = tmp_path / "cluster.yaml"
    impatient.write_text(CPU.read_text().replace("starts_without_progress: 3", "starts_without_progress: 2"))
    job = disturbed.submit(CLUSTER=str(impatient), DIES="3")
    facts = disturbed.cluster.wait(job, "FAILED", "COMPLETED")
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "1")
    assert status_in(disturbed.partial)["state"] == "failed"
    why = status_in(disturbed.partial)["why"]
    assert why.startswith("2 starts one after another got no further; the last one: distill: rank 3 was killed by signal 9")
