"""`minitron run` from a Hugging Face model to an exported student: killed, continued, left alone when nothing changed.

One scenario in order, because starting a stage costs seconds: each test looks at one thing that it left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.data.batches import collate
from minitron_megatron.model.build import build_model
from minitron_megatron.model.logits import real_logits
from minitron_megatron.model.run import forward_only
from minitron_megatron.parallel.layout import destroy_layout, global_layout
from minitron_megatron.parallel.world import distributed_world
from minitron_megatron.platform import activate

from .tiny_model import STEPS, write_model, write_recipe, write_text

STAGES = ("import", "data", "importance", "prune", "distill", "evaluate", "export", "report")
BEFORE_DISTILL, FROM_DISTILL = STAGES[:4], STAGES[4:]
KILL_BEHIND_STEP = 12
PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class Scenario:
    """What each start said, and what lay on disk in between."""

    folder: Path
    left_by_kill: list[str]
    """Lines of metrics.jsonl when the run was killed."""
    checkpoint_at_kill: int
    survivors: list[int]
    """Workers of the killed run that went on."""
    continued: str
    again: str
    ids: dict[str, str]
    """Of each artifact, after the second start."""
    changed: str
    ids_after_change: dict[str, str]
    metrics: list[str]
    """Lines of metrics.jsonl after the second start."""


def command(recipe: Path, *overrides: str, verb: str = "run") -> list[str]:
    return [sys.executable, "-m", "minitron_megatron.cli", verb, str(recipe), *overrides]


def environment(recipe: Path) -> dict[str, str]:
    """Of a machine without a network, and without a setting that says so: offline/sitecustomize.py."""
    here = Path(__file__)
    path = os.pathsep.join(filter(None, [str(here.with_name("offline")), str(here.parents[2]), os.environ.get("PYTHONPATH")]))
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    users = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return {**users, **one_thread, "PYTHONPATH": path, "COLUMNS": "200", "NETWORK_LOG": str(network_log(recipe))}


def network_log(recipe: Path) -> Path:
    """What was asked for beyond this machine."""
    return recipe.with_name("network.log")


def start(recipe: Path, *overrides: str, verb: str = "run", timeout_seconds: float = 2 * PATIENCE_SECONDS) -> str:
    """Runs the chain, or one stage, to its end; its output."""
    done = subprocess.run(
        command(recipe, *overrides, verb=verb), env=environment(recipe), cwd=recipe.parent, capture_output=True, text=True, timeout=timeout_seconds
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not network_log(recipe).exists(), network_log(recipe).read_text()
    return done.stdout


def start_and_kill(recipe: Path, partial: Path) -> list[int]:
    """Starts the chain and kills its process group behind KILL_BEHIND_STEP; ids of workers that are alive half a second later."""
    log = recipe.parent / "killed.log"
    with log.open("w") as output:
        chain = subprocess.Popen(command(recipe), env=environment(recipe), cwd=recipe.parent, stdout=output, stderr=output, start_new_session=True)
    try:
        # a checkpoint is written while training goes on, so it may come some steps later
        wait_until(lambda: len(lines(partial / "metrics.jsonl")) > KILL_BEHIND_STEP and any((partial / "training").glob("step_*")), chain, log)
        family = psutil.Process(chain.pid).children(recursive=True)
        workers = [process for process in family if is_worker(process)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(chain.pid, signal.SIGKILL)
        chain.wait()
    time.sleep(0.5)
    alive = [process.pid for process in workers if goes_on(process)]
    for process in family:  # with them megatron's helper processes, which only sleep
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=5)
    return alive


def is_worker(process: psutil.Process) -> bool:
    """A checkpoint's writer that has just ended is none."""
    with contextlib.suppress(psutil.NoSuchProcess):  # psutil's ZombieProcess is one
        return "minitron_megatron.worker" in process.cmdline()
    return False


def goes_on(process: psutil.Process) -> bool:
    """A dead process that nobody has asked for its exit code does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(ready: Callable[[], bool], chain: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert chain.poll() is None, "the chain ended before it could be killed:\n" + log.read_text()
        assert time.monotonic() < deadline, "the chain did not come to its distillation in time"
        time.sleep(0.02)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def artifact_ids(run: Path) -> dict[str, str]:
    return {stage: json.loads((run / stage / "manifest.json").read_text())["id"] for stage in STAGES}


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    folder = tmp_path_factory.mktemp("chain")
    write_text(folder / "text")
    write_model(folder / "model", folder / "text")
    recipe, run = write_recipe(folder), folder / "runs" / "tiny"
    survivors = start_and_kill(recipe, run / ".distill.partial")
    left = lines(run / ".distill.partial" / "metrics.jsonl")
    saved = max(int(path.name.removeprefix("step_")) for path in (run / ".distill.partial" / "training").glob("step_*"))
    continued = start(recipe)
    metrics, ids = lines(run / "distill" / "metrics.jsonl"), artifact_ids(run)
    again = start(recipe)
    changed = start(recipe, "distill.steps=6")
    return Scenario(folder, left, saved, survivors, continued, again, ids, changed, artifact_ids(run), metrics)


def up_to_date(output: str) -> list[str]:
    return [line.split(":")[0] for line in output.splitlines() if ": up to date" in line]


def test_a_killed_run_continues_from_its_checkpoint(scenario: Scenario) -> None:
    """Lines that were logged ahead of the checkpoint are the same bytes, clock readings included: those steps were not run again."""
    assert scenario.checkpoint_at_kill >= 5
    kept = scenario.checkpoint_at_kill + 1  # with the validation of step 0
    assert scenario.metrics[:kept] == scenario.left_by_kill[:kept]
    assert [json.loads(line)["step"] for line in scenario.metrics] == list(range(STEPS + 1))
    assert up_to_date(scenario.continued) == list(BEFORE_DISTILL)


def test_no_stage_asks_beyond_this_machine_and_one_that_did_would_be_seen(scenario: Scenario, tmp_path: Path) -> None:
    """Every start of this file and of its neighbours looks at the log; here that a library's question, which it forgives itself, is in it."""
    assert not network_log(scenario.folder / "recipe.yaml").exists()
    asks = "import contextlib, socket\nwith contextlib.suppress(OSError):\n    socket.create_connection(('huggingface.co', 443), timeout=1)\n"
    asks += "with contextlib.suppress(OSError):\n    socket.create_connection(('192.0.2.1', 443), timeout=1)\n"
    asks += "server = socket.create_server(('127.0.0.1', 0))\nsocket.create_connection(server.getsockname())\n"
    recipe = tmp_path / "recipe.yaml"
    subprocess.run([sys.executable, "-c", asks], env=environment(recipe), check=True)
    assert [line.split(" [")[0] for line in network_log(recipe).read_text().splitlines()] == [
        "socket.getaddrinfo huggingface.co",
        "socket.connect ('192.0.2.1', 443)",
    ]


def test_a_killed_run_leaves_no_process_behind(scenario: Scenario) -> None:
    """A worker that goes on alone would write into the folder that the next start continues from."""
    assert scenario.survivors == []


def test_a_second_start_finds_every_stage_up_to_date(scenario: Scenario) -> None:
    assert up_to_date(scenario.again) == list(STAGES)


def test_other_steps_run_distill_and_what_follows_it_again(scenario: Scenario) -> None:
    assert up_to_date(scenario.changed) == list(BEFORE_DISTILL)
    same = [stage for stage in STAGES if scenario.ids[stage] == scenario.ids_after_change[stage]]
    assert same == list(BEFORE_DISTILL)


def test_the_report_and_the_table_are_there(scenario: Scenario) -> None:
    run = scenario.folder / "runs" / "tiny"
    assert "<html" in (run / "report" / "report.html").read_text()
    assert "Perplexity" in scenario.continued
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]  # nothing half-done is left


def test_the_exported_student_gives_our_logits_in_plain_transformers(scenario: Scenario) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = scenario.folder / "runs" / "tiny"
    model = AutoModelForCausalLM.from_pretrained(run / "export" / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "export" / "model")
    tokens = torch.tensor(tokenizer("the old harbour lies behind a wall of salt and bread")["input_ids"])
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    arch = Architecture.from_dict(json.loads((run / "distill" / "result.json").read_text())["architecture"])
    ours = our_logits(run / "distill" / "checkpoint", arch, tokens)
    assert theirs.shape == (len(tokens), arch.vocab)
    assert torch.isfinite(theirs).all()
    assert theirs.argmax(-1).equal(ours.argmax(-1))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)  # fp32, two implementations; logits are about 1


def our_logits(checkpoint: Path, arch: Architecture, tokens_S: Tensor) -> Tensor:
    """[S, V] of the distilled checkpoint, through megatron in this process."""
    with one_process() as (world, layout):
        model = build_model(arch, layout, world.platform, torch.float32)
        load_model(model, checkpoint)
        batch = collate([torch.cat([tokens_S, tokens_S[:1]])], [0])  # type: ignore[arg-type]
        return forward_only(model, [batch], consume=lambda hidden, _: real_logits(model, hidden[:, 0]))[0]


@contextlib.contextmanager
def one_process() -> Iterator[tuple]:
    with distributed_world(activate("cpu")) as world:
        try:
            yield world, global_layout(Parallel(), world)
        finally:
            destroy_layout()
