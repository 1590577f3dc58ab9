"""A tiny model's chain as SLURM jobs over two nodes, and what disturbs one: limits, signals, killed processes, lost nodes, mistakes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import Cluster, wait_until

pytestmark = pytest.mark.slow

STEPS, SAVED_EVERY = 200, 40
TRAINING = (f"distill.steps={STEPS}", f"distill.save_every_steps={SAVED_EVERY}", "distill.validate_every_steps=100")


@dataclass(frozen=True)
class Run:
    """What a pipeline left."""

    jobs: dict[str, int]
    folder: Path
    """runs/NAME"""

    def result(self, stage: str) -> dict[str, Any]:
        return json.loads((self.folder / stage / "result.json").read_text())

    def manifest(self, stage: str) -> dict[str, Any]:
        return json.loads((self.folder / stage / "manifest.json").read_text())


def pipeline(cluster: Cluster, recipe: Path, *overrides: str) -> dict[str, int]:
    """Ids of the jobs by stage."""
    printed = cluster.run("slurm/pipeline_8b_to_4b.sh", str(recipe), *overrides, SBATCH_ARGS="--nodes=2 --time=01:00:00")
    return {stage: int(job) for stage, job in (line.split() for line in printed.splitlines())}


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, recipe: Path) -> Run:
    jobs = pipeline(cluster, recipe, *TRAINING)
    queued = json.loads((recipe.parent / "runs" / "tiny" / ".export.partial" / "status.json").read_text())
    assert (queued["state"], queued["job"]) == ("queued", str(jobs["export"]))
    for job in jobs.values():
        cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    told = {stage: cluster.log(job) for stage, job in jobs.items() if cluster.facts(job)["JobState"] != "COMPLETED"}
    assert not told, "\n".join(f"{stage}: {log}" for stage, log in told.items())
    return Run(jobs, recipe.parent / "runs" / "tiny")


def test_the_chain_runs_in_the_order_of_its_stages(undisturbed: Run) -> None:
    assert list(undisturbed.jobs) == ["import", "data", "importance", "prune", "distill", "evaluate", "export", "report"]
    for stage in undisturbed.jobs:
        assert json.loads((undisturbed.folder / stage / "status.json").read_text())["state"] == "finished"


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


def test_a_pipeline_that_is_up_to_date_submits_nothing(cluster: Cluster, recipe: Path, undisturbed: Run) -> None:
    assert "everything is up to date" in cluster.run("slurm/pipeline_8b_to_4b.sh", str(recipe), *TRAINING)


@dataclass
class Disturbed:
    """A distillation of its own, from the artifacts of the undisturbed run."""

    cluster: Cluster
    recipe: Path
    folder: Path

    def submit(self, *overrides: str, options: tuple[str, ...] = ("--time=01:00:00",)) -> int:
        arguments = (str(self.recipe), *TRAINING, f"runs={self.folder.parent}", *overrides)
        return self.cluster.submit("distill", *arguments, options=("--nodes=2", *options))

    @property
    def partial(self) -> Path:
        return self.folder / ".distill.partial"

    def status(self) -> dict[str, Any]:
        file = self.partial / "status.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def wait_for_step(self, job: int, step: int) -> None:
        def reached() -> bool:
            return self.status().get("state") == "running" and self.status().get("step", 0) >= step

        wait_until(reached, lambda: f"{self.status()}\n{self.cluster.log(job)}")

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

    def steps(self) -> list[int]:
        return [json.loads(line)["step"] for line in (self.folder / "distill" / "metrics.jsonl").read_text().splitlines()]

    def require_the_same_end(self, undisturbed: Run) -> None:
        """To the bit, and each step once: no sample lost, none repeated."""
        found = json.loads((self.folder / "distill" / "result.json").read_text())
        expected = undisturbed.result("distill")
        assert found["weights_sha256"] == expected["weights_sha256"]
        assert found["validation"] == expected["validation"]
        assert found["tokens"] == expected["tokens"]
        assert self.steps() == list(range(STEPS + 1))


@pytest.fixture
def disturbed(cluster: Cluster, recipe: Path, undisturbed: Run, tmp_path: Path) -> Disturbed:
    folder = tmp_path / "runs" / "tiny"
    for stage in ("import", "data", "importance", "prune"):
        shutil.copytree(undisturbed.folder / stage, folder / stage)
    return Disturbed(cluster, recipe, folder)


def test_a_time_limit_is_met_with_a_checkpoint_and_the_run_ends_in_the_same_bits(disturbed: Disturbed, undisturbed: Run) -> None:
    """Of two minutes the signal comes in the first one: SLURM counts in half minutes, and sends it early rather than late."""
    slower = "distill.validate_every_steps=1"  # the run has to last longer than half a minute, and its training is the same
    job = disturbed.submit(slower, options=("--time=00:02:00", "--signal=B:USR1@100"))
    facts = disturbed.cluster.wait(job)
    assert int(facts["Restarts"]) >= 1
    assert "SIGUSR1: the step is asked to save and to stop" in disturbed.cluster.log(job)
    assert "asked to stop: saved behind step" in disturbed.cluster.log(job)
    disturbed.require_the_same_end(undisturbed)


def test_a_term_signal_and_a_killed_rank_are_overcome_in_one_job(disturbed: Disturbed, undisturbed: Run) -> None:
    job = disturbed.submit()
    disturbed.wait_for_step(job, 5)
    disturbed.cluster.run("scancel", "--signal=TERM", str(job))
    wait_until(lambda: disturbed.cluster.facts(job)["Restarts"] == "1", lambda: disturbed.cluster.log(job))
    assert disturbed.status()["state"] in ("queued", "running")
    saved = re.search(rf"distill: asked to stop: saved behind step (\d+) of {STEPS}", disturbed.cluster.log(job))
    assert saved and 5 <= int(saved[1]) < STEPS
    wait_until(lambda: disturbed.status().get("saved_step", 0) >= SAVED_EVERY, lambda: disturbed.cluster.log(job))
    disturbed.workers(1)[-1].send_signal(signal.SIGKILL)
    wait_until(lambda: disturbed.cluster.facts(job)["Restarts"] == "2", lambda: disturbed.cluster.log(job))
    disturbed.wait_for_step(job, SAVED_EVERY)  # at most one save interval is lost
    disturbed.cluster.wait(job)
    assert "rank 3 was killed by signal 9 (SIGKILL)" in disturbed.cluster.log(job)
    disturbed.require_the_same_end(undisturbed)


def test_a_lost_node_is_waited_for_and_the_run_goes_on(disturbed: Disturbed, undisturbed: Run) -> None:
    job = disturbed.submit()
    wait_until(lambda: disturbed.status().get("saved_step", 0) >= SAVED_EVERY, lambda: disturbed.cluster.log(job))
    lost = disturbed.cluster.slurmd(2)
    workers = disturbed.workers(1)
    victims = [*workers, *{parent for worker in workers for parent in worker.parents() if parent.name() == "slurmstepd"}]
    assert len(victims) == 3
    os.kill(lost, signal.SIGKILL)
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    wait_until(lambda: "down" in " ".join(disturbed.cluster.nodes()), lambda: str(disturbed.cluster.nodes()))
    wait_until(lambda: disturbed.cluster.facts(job)["JobState"] == "PENDING", lambda: str(disturbed.cluster.facts(job)))
    disturbed.cluster.start_slurmd(2)
    disturbed.cluster.wait(job)
    disturbed.require_the_same_end(undisturbed)


def test_a_failed_stage_stops_the_chain_with_its_reason(cluster: Cluster, disturbed: Disturbed) -> None:
    """A loss that is not finite would be so again: no second start."""
    jobs = pipeline(cluster, disturbed.recipe, *TRAINING, f"runs={disturbed.folder.parent}", "distill.learning_rate.peak=1e30")
    assert list(jobs) == ["distill", "evaluate", "export", "report"]
    facts = cluster.wait(jobs["distill"], "FAILED", "COMPLETED", "CANCELLED")
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("FAILED", "0", "2:0")
    assert disturbed.status()["state"] == "failed"
    assert "has loss nan" in disturbed.status()["why"] or "gradient norm" in disturbed.status()["why"]
    for stage in ("evaluate", "export", "report"):
        assert cluster.wait(jobs[stage], "CANCELLED")["Restarts"] == "0"


def test_a_node_that_fails_the_health_check_stops_the_job_with_its_reason(disturbed: Disturbed, tmp_path: Path) -> None:
    poor = tmp_path / "cluster.yaml"
    poor.write_text(Path("configs/cluster/cpu.yaml").read_text().replace("memory_free_gib: 0.1", "memory_free_gib: 1000000"))
    disturbed.cluster.environment["CLUSTER"] = str(poor)
    try:
        job = disturbed.submit()
    finally:
        disturbed.cluster.environment["CLUSTER"] = "configs/cluster/cpu.yaml"
    facts = disturbed.cluster.wait(job, "FAILED", "COMPLETED")
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("FAILED", "0", "2:0")
    assert re.match(r"health check of node node[12]: .* GiB of memory are free, 1e\+06 are asked for", disturbed.status()["why"])


def test_a_job_that_gets_no_further_is_given_up(disturbed: Disturbed, tmp_path: Path) -> None:
    """Each start dies before it has saved anything: here a Python that kills the last rank as it begins."""
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nif os.environ.get('RANK') == '3':\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    patient = tmp_path / "cluster.yaml"
    patient.write_text(Path("configs/cluster/cpu.yaml").read_text().replace("starts_without_progress: 3", "starts_without_progress: 2"))
    before = dict(disturbed.cluster.environment)
    disturbed.cluster.environment.update(CLUSTER=str(patient), PYTHONPATH=str(tmp_path))
    try:
        job = disturbed.submit()
    finally:
        disturbed.cluster.environment = before
    facts = disturbed.cluster.wait(job, "FAILED", "COMPLETED")
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "1")
    assert disturbed.status()["state"] == "failed"
    assert disturbed.status()["why"].startswith("2 starts one after another got no further")
