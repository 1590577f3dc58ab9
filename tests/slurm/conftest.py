"""A real SLURM cluster of two nodes on this machine, and what a user brings to it; skipped with the reason where SLURM is not installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from e2e.tiny_model import write_model, write_recipe, write_text

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
NODES = 2
PATIENCE_SECONDS = 400
"""Of a job on a busy machine; a start of two ranks on each of two nodes takes ten seconds on an idle one."""


@dataclass
class Cluster:
    """Its commands, as a user types them in the checkout."""

    folder: Path
    daemons: subprocess.Popen[str]
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, **environment: str) -> str:
        """What it prints; raises CalledProcessError with what it said in its notes."""
        done = subprocess.run(
            command, env={**self.environment, **environment}, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> int:
        log = f"--output={self.folder / 'logs' / '%x-%j.log'}"
        return int(self.run("sbatch", "--parsable", log, *options, f"slurm/{script}.sh", *arguments, **environment))

    def facts(self, job: int) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode, Reason …"""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", str(job))))

    def wait(self, job: int, *states: str) -> dict[str, str]:
        """Until the job is in one of the states; COMPLETED where none is named."""
        wanted = states or ("COMPLETED",)
        return wait_until(lambda: known if (known := self.facts(job))["JobState"] in wanted else None, lambda: f"{self.facts(job)}\n{self.log(job)}")

    def log(self, job: int) -> str:
        return "\n".join(path.read_text(errors="replace") for path in (self.folder / "logs").glob(f"*-{job}.log"))

    def nodes(self) -> list[str]:
        return self.run("sinfo", "--noheader", "-N", "--partition=batch", "-o", "%T").split()

    def clear(self) -> None:
        """Ends what a test has left in the queue; the next one finds idle nodes."""
        if jobs := self.run("squeue", "--noheader", "-o", "%i").split():
            self.run("scancel", "--quiet", *jobs)
        wait_until(lambda: self.nodes() == ["idle"] * NODES, lambda: str(self.nodes()))

    def slurmd(self, number: int) -> int:
        """Its process id."""
        return int((self.folder / f"slurmd.node{number}.pid").read_text())

    def start_slurmd(self, number: int) -> None:
        assert self.daemons.stdin
        self.daemons.stdin.write(f"start {number}\n")
        self.daemons.stdin.flush()


def wait_until(ready: Callable[[], object], explain: Callable[[], str] = lambda: "", seconds: float = PATIENCE_SECONDS) -> object:
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s; {explain()}"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install --no-install-recommends slurm-wlm munge (launch/test.sh --all does, as root)")
    folder = Path(tempfile.mkdtemp(prefix="minitron_slurm_"))  # short: the path of a socket has 107 characters at most
    (folder / "logs").mkdir()
    daemons = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("daemons.py")), str(folder), str(NODES)], stdin=subprocess.PIPE, text=True
    )
    found = Cluster(folder, daemons, environment_of_jobs(folder))
    try:
        wait_until(lambda: answers(found) == ["idle"] * NODES, lambda: (folder / "output.log").read_text(), seconds=60)
        yield found
    finally:
        daemons.communicate()  # closes its input: it ends all that it started
        shutil.rmtree(folder, ignore_errors=True)


def answers(cluster: Cluster) -> list[str]:
    """States of the nodes, none while the cluster starts."""
    command = ["sinfo", "--noheader", "-N", "--partition=batch", "-o", "%T"]
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True).stdout.split()


def environment_of_jobs(folder: Path) -> dict[str, str]:
    """SLURM's own variables of a job in which the tests may run are not this cluster's."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "MASTER_"))}
    clean.update(SLURM_CONF=str(folder / "slurm.conf"), CLUSTER="configs/cluster/cpu.yaml", LOGS=str(folder / "logs"))
    clean.update(MINITRON_PYTHON=sys.executable, OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="0", HF_HUB_OFFLINE="1")
    return clean


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two nodes with two ranks each: two stages of a pipeline, two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("tiny")
    write_text(folder / "text")
    write_model(folder / "model", folder / "text")
    path = write_recipe(folder)
    path.write_text(path.read_text().replace("parallel:\n  pipeline: 2\n", "parallel:\n  pipeline: 2\n  data: 2\n"))
    return path
