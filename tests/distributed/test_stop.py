"""A distillation of which one process is asked to stop saves behind the same step on all, and goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from minitron_megatron.artifact import find_artifact
from minitron_megatron.config.schema import Recipe
from minitron_megatron.parallel.world import World
from minitron_megatron.training.stop import SIGNALS, Stopped

from .conftest import Identical
from .house import STEPS, copy_of, publish_stage, recipe_for
from .pool import Pool
from .tiny import DP2

ASKED_BEHIND = 3


def stopped(world: World, recipe: Recipe, number: int) -> str:
    """What the stage raises; the last process is sent a signal once some steps are logged."""
    before = {one: signal.getsignal(one) for one in SIGNALS}
    if world.rank == world.size - 1:
        metrics = Path(recipe.runs) / recipe.name / ".distill.partial" / "metrics.jsonl"
        threading.Thread(target=ask_behind, args=(metrics, number), daemon=True).start()
    try:
        publish_stage(world, "distill", recipe)
    except Stopped as told:
        return str(told)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    return "finished"


def ask_behind(metrics: Path, number: int) -> None:
    while not metrics.is_file() or len(metrics.read_text().splitlines()) <= ASKED_BEHIND:
        time.sleep(0.001)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_one_process_that_is_asked_stops_all_behind_one_step(pool: Pool, house: Path, tmp_path: Path, number: int, identical: Identical) -> None:
    straight, disturbed = copy_of(house, tmp_path / "straight"), copy_of(house, tmp_path / "disturbed")
    # saved far from where it stops
    pool.run(publish_stage, "distill", recipe_for(straight, DP2, save_every_steps=STEPS), processes=2)
    recipe = recipe_for(disturbed, DP2, save_every_steps=STEPS)
    told = pool.run(stopped, recipe, number, processes=2)
    assert told[0] == told[1] and told[0].startswith("distill: asked to stop: saved behind step ")
    step = int(told[0].split("behind step ")[1].split()[0])
    assert ASKED_BEHIND <= step < STEPS
    partial = disturbed / "tiny" / ".distill.partial"
    assert [path.name for path in (partial / "training").iterdir()] == [f"step_{step:08d}"]
    status = json.loads((partial / "status.json").read_text())
    assert (status["state"], status["step"], status["saved_step"], status["steps"]) == ("saved", step, step, STEPS)
    pool.run(publish_stage, "distill", recipe, processes=2)
    found, expected = (find_artifact(runs / "tiny", "distill") for runs in (disturbed, straight))
    assert found and expected
    assert identical("distillation that was asked to stop", "dp2", found.result["weights_sha256"] == expected.result["weights_sha256"])
    assert found.result["validation"] == expected.result["validation"] and found.result["tokens"] == expected.result["tokens"]
    steps = [json.loads(line)["step"] for line in (found.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS + 1))
