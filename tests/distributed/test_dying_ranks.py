"""A process that dies takes its stage along within seconds, and its own error is the one that is shown: through the real launcher."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.source import Model

from .house import SOURCE, copy_of, recipe_for
from .pool import ENVIRONMENT
from .tiny import SEQUENCE

REPOSITORY = Path(__file__).resolve().parents[2]
PARALLEL = Parallel(tensor=2, pipeline=2)
START_SECONDS, END_SECONDS = 120, 30
# a Python that raises when it is told to, in the middle of whatever it does
SITECUSTOMIZE = """
import re
import shutil
import signal
def fail(*_):
    raise ValueError("broken on purpose")
signal.signal(signal.SIGUSR2, fail)
"""


@dataclass(frozen=True)
class Ended:
    """A stage that was started, hit in the middle of a step, and ended."""

    code: int
    seconds: float
    """From the blow to the launcher's end."""
    error: str
    left: list[int]
    """Workers that live on."""


@pytest.fixture(scope="module")
def recipe(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of more steps than anybody waits for, and artifacts to start from."""
    folder = tmp_path_factory.mktemp("dying")
    runs = copy_of(house, folder / "runs")
    (folder / "model").mkdir()
    config = json.loads((runs / "tiny" / "import" / "hf_config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": SOURCE.vocab, "max_position_embeddings": SOURCE.max_positions}))
    values = recipe_for(runs, PARALLEL, steps=100_000, save_every_steps=100_000, validate_every_steps=100_000).model_dump(mode="json")
    model = Model(path=str(folder / "model"))
    values["model"] = model.model_dump(mode="json")
    values["evaluate"] = {"sequence_length": SEQUENCE}
    manifest = runs / "tiny" / "import" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "settings": {"model": model.shaping()}}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return folder / "recipe.yaml"


def hit(recipe: Path, blows: dict[int, int], *overrides: str) -> Ended:
    """Starts a distillation in 4 processes and sends each rank of blows its signal once the steps go."""
    path = os.pathsep.join([str(recipe.parent / "site"), str(REPOSITORY)])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    command = [sys.executable, "-m", "minitron_megatron.cli", "distill", str(recipe), *overrides]
    log = recipe.parent / "log"
    with log.open("w") as stderr:
        job = subprocess.Popen(command, env=environment, cwd=recipe.parent, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True)
    workers: dict[int, psutil.Process] = {}
    try:
        wait_for_steps(job, recipe.parent / "runs" / "tiny" / ".distill.partial" / "metrics.jsonl", log)
        workers = {int(process.environ()["RANK"]): process for process in psutil.Process(job.pid).children(recursive=True) if is_worker(process)}
        started = time.monotonic()
        for rank, blow in blows.items():
            workers[rank].send_signal(blow)
        code = job.wait(START_SECONDS)
        seconds = time.monotonic() - started
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        alive = [rank for rank, process in workers.items() if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        for rank in alive:
            workers[rank].kill()
    return Ended(code, seconds, log.read_text(), alive)


def is_worker(process: psutil.Process) -> bool:
    return "minitron_megatron.worker" in process.cmdline() and "RANK" in process.environ()


def wait_for_steps(job: subprocess.Popen[bytes], metrics: Path, log: Path) -> None:
    metrics.unlink(missing_ok=True)
    deadline = time.monotonic() + START_SECONDS
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 3):
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "no step in time"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_rank_is_named_and_its_peers_lost_connections_are_not(recipe: Path) -> None:
    """Its three peers see "connection closed by peer" within milliseconds, before the launcher knows of the kill."""
    ended = hit(recipe, {3: signal.SIGKILL})
    assert (ended.code, ended.left) == (1, [])
    assert ended.seconds < END_SECONDS
    assert ended.error.splitlines() == [
        line for line in ended.error.splitlines() if line.startswith("distill: rank 3 was killed by signal 9 (SIGKILL)")
    ]


@pytest.mark.slow
def test_an_exception_in_the_middle_of_a_step_is_the_only_traceback(recipe: Path) -> None:
    ended = hit(recipe, {1: signal.SIGUSR2}, "parallel.tensor=1")
    assert (ended.code, ended.left) == (1, [])
    assert ended.seconds < END_SECONDS
    assert ended.error.splitlines()[0] == "distill: rank 1 failed: ValueError: broken on purpose"
    assert ended.error.count("Traceback") == 1 and "in fail" in ended.error


@pytest.mark.slow
def test_the_first_of_several_that_die_is_named(recipe: Path) -> None:
    ended = hit(recipe, {0: signal.SIGKILL, 2: signal.SIGUSR2})
    assert ended.error.startswith("distill: rank 0 was killed by signal 9 (SIGKILL)")
    assert ended.seconds < END_SECONDS


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_as_long_as_the_recipe_says_and_named(recipe: Path) -> None:
    """Stopped, it does not even obey the launcher's SIGTERM: torchelastic gives it 30 seconds, which have no setting."""
    ended = hit(recipe, {2: signal.SIGSTOP}, "parallel.timeout_seconds=15")
    assert (ended.code, ended.left) == (1, [])
    assert ended.seconds < 15 + 2 * END_SECONDS
    first = ended.error.splitlines()[0]
    assert "after it had waited for others too long (parallel.timeout_seconds)" in first
    assert "the ranks that told nothing, which may have hung: 2:" in first
    assert ended.error.count("Traceback") == 1


@pytest.mark.slow
def test_a_killed_rank_is_started_again_from_the_checkpoint_and_sigterm_saves_before_it_ends(recipe: Path) -> None:
    """`launch/torchrun.sh --restarts=1` on one node, and what `kill` does to its launcher."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY), "MINITRON_PYTHON": sys.executable, "NPROC": "4"}
    command = [str(REPOSITORY / "launch" / "torchrun.sh"), "--restarts=1", "distill", str(recipe), "distill.save_every_steps=5"]
    partial, log = recipe.parent / "runs" / "tiny" / ".distill.partial", recipe.parent / "log"
    shutil.rmtree(partial, ignore_errors=True)
    with log.open("w") as output:
        job = subprocess.Popen(command, env=environment, cwd=recipe.parent, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for_save(job, partial, 5, log)
        workers = [process for process in psutil.Process(job.pid).children(recursive=True) if is_worker(process)]
        next(process for process in workers if process.environ()["RANK"] == "3").kill()
        wait_for_text(job, log, "distill: started again from its last checkpoint; 1 more without a new one")
        saved = wait_for_save(job, partial, 15, log)
        job.send_signal(signal.SIGTERM)
        assert job.wait(START_SECONDS) == 75, log.read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    told = re.search(r"distill: asked to stop: saved behind step (\d+) of 100000", log.read_text())
    assert told and int(told[1]) >= saved
    assert (partial / "training" / f"step_{int(told[1]):08d}" / "progress.json").is_file()
    assert json.loads((partial / "status.json").read_text())["state"] == "saved"


def wait_for_save(job: subprocess.Popen[bytes], partial: Path, step: int, log: Path) -> int:
    """The newest step that status.json tells to be saved, `step` or a later one."""
    deadline, saved = time.monotonic() + START_SECONDS, 0
    while saved < step:
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
        if (partial / "status.json").is_file():
            saved = json.loads((partial / "status.json").read_text()).get("saved_step", 0)
    return saved


def wait_for_text(job: subprocess.Popen[bytes], log: Path, text: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while text not in log.read_text():
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
