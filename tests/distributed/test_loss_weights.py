"""Weights of losses that move: in every layout, in the log, and over an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.config.distill import HiddenLoss
from minitron_megatron.config.losses import WeightSchedule
from minitron_megatron.config.parallel import Parallel

from .conftest import Identical, Record
from .house import copy_of, publish_stage, recipe_for
from .pool import Pool
from .test_distill import Run, distill_until
from .tiny import ONE, PP2, TP2_SP, layout_name, relative_difference

STEPS = 9
FALLING = WeightSchedule.model_validate({"from": 1.0, "to": 0.2, "kind": "linear"})
LOSS = {"reverse_kl": FALLING, "mse": "dynamic", "cross_entropy": 0.25}
CHANGES: dict[str, Any] = {"loss": LOSS, "steps": STEPS, "save_every_steps": 4, "validate_every_steps": STEPS}
Whole = Callable[[Parallel], Run]


@pytest.fixture(scope="module")
def whole(pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """whole(layout): the uninterrupted run, made once."""
    made: dict[str, Run] = {}

    def run(parallel: Parallel) -> Run:
        key = layout_name(parallel)
        if key not in made:
            runs = copy_of(house, tmp_path_factory.mktemp("weights") / "runs")
            pool.run(publish_stage, "distill", recipe_for(runs, parallel, **CHANGES), processes=parallel.processes)
            made[key] = Run(runs / "tiny" / "distill", [])
        return made[key]

    return run


def test_every_step_has_its_own_weights_and_their_losses_in_the_log(whole: Whole) -> None:
    run = whole(ONE)
    reverse, mse, cross_entropy, loss = (run.steps(name) for name in ("reverse_kl", "mse", "cross_entropy", "loss"))
    falling, following = run.steps("weight_reverse_kl"), run.steps("weight_mse")
    assert falling == pytest.approx([1.0 - 0.1 * step for step in range(STEPS)], rel=1e-12)  # 0.8 over the 8 steps behind the first
    # the ratio of the step before; in fp32, from sums in fp64
    assert following[1:] == pytest.approx([weight * a / b for weight, a, b in zip(falling, reverse, mse, strict=True)][:-1], rel=1e-6)
    # the first one is measured ahead of the first step, from its own samples
    assert following[0] == pytest.approx(reverse[0] / mse[0], rel=1e-6)
    expected = [a * b + c * d + 0.25 * e for a, b, c, d, e in zip(falling, reverse, following, mse, cross_entropy, strict=True)]
    assert loss == pytest.approx(expected, rel=1e-12)
    assert all(kl > 0 for kl in run.steps("forward_kl"))  # logged, though it is not trained on
    assert run.records()[-1]["validation"].keys() >= {"forward_kl", "cross_entropy", "perplexity", "reverse_kl", "mse"}


def test_alpha_follows_the_logits_losses_at_their_own_dynamic_weights_from_the_first_step_on(pool: Pool, house: Path, tmp_path: Path) -> None:
    """Measured ahead of it: KL and an MSE of the same weight are 2 KL to the hidden losses."""
    runs = copy_of(house, tmp_path / "runs")
    changes = {**CHANGES, "loss": {"forward_kl": 1.0, "mse": "dynamic"}, "steps": 4, "hidden": HiddenLoss(pairs=[(2, 1)])}
    pool.run(publish_stage, "distill", recipe_for(runs, **changes), processes=1)
    run = Run(runs / "tiny" / "distill", [])
    kl, mse, weight, hidden, alpha = (run.steps(name) for name in ("forward_kl", "mse", "weight_mse", "hidden", "alpha"))
    assert alpha[0] == pytest.approx(2 * kl[0] / hidden[0], rel=1e-6)
    followed = [(a + b * c) / d for a, b, c, d in zip(kl, weight, mse, hidden, strict=True)]
    assert alpha[1:] == pytest.approx(followed[:-1], rel=1e-6)  # of the step before, at the weights that it had; α in fp32


@pytest.mark.parametrize("parallel", [TP2_SP, pytest.param(PP2, marks=pytest.mark.slow)], ids=layout_name)
def test_losses_and_weights_agree_in_every_layout(whole: Whole, measured: Record, parallel: Parallel) -> None:
    """Later steps drift by what Adam makes of rounding."""
    one, found = whole(ONE), whole(parallel)
    for name in ("loss", "forward_kl", "reverse_kl", "mse", "weight_mse", "gradient_norm"):
        difference = max(relative_difference(a, b) for a, b in zip(found.steps(name), one.steps(name), strict=True))
        assert measured(f"9 steps with moving weights: {name}", layout_name(parallel), difference) <= 1e-4


def test_an_interrupted_run_goes_on_with_the_weights_that_it_would_have_had(
    pool: Pool, house: Path, whole: Whole, tmp_path: Path, identical: Identical
) -> None:
    recipe = recipe_for(copy_of(house, tmp_path / "runs"), ONE, **CHANGES)
    pool.run(distill_until, recipe, 6, processes=1)  # the last checkpoint is behind step 4
    pool.run(publish_stage, "distill", recipe, processes=1)
    found, expected = Run(tmp_path / "runs" / "tiny" / "distill", []), whole(ONE)
    names = ("loss", "weight_reverse_kl", "weight_mse", "gradient_norm")
    same = found.bits() == expected.bits() and all(found.steps(name) == expected.steps(name) for name in names)
    assert identical("an interrupted and resumed distillation, as the whole one", "one with moving weights", same)
