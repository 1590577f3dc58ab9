"""The distillation stage with hidden-state losses whose weight follows the step before: layouts agree, no projection is published."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import TorchDistReader
from minitron_megatron.config.distill import HiddenLoss
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.data.samples import packed_samples
from minitron_megatron.distill.hidden.map import hidden_terms

from .conftest import Identical, Record
from .house import SOURCE, STEPS, TARGET, copy_of, publish_stage, recipe_for
from .plain_model import PlainModel, hidden_loss, kd_loss
from .pool import Pool
from .test_distill import UNSAVED_STEPS, distill_until
from .tiny import DP2, ONE, PP2, PP2_VPP2, SEQUENCE, TP2_SP, layout_name, relative_difference

# on all of four stages
PAIRS = [(2, 1), (2, 3), (5, 4)]
HIDDEN = HiddenLoss(pairs=PAIRS, embeddings=True)
GLOBAL_BATCH = 4


@dataclass(frozen=True)
class Run:
    """A published distillation, and the run folder."""

    runs: Path

    @property
    def path(self) -> Path:
        return self.runs / "tiny" / "distill"

    def steps(self, name: str) -> list[float]:
        records: list[dict[str, Any]] = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [record[name] for record in records if record["step"] > 0]


Whole = Callable[[Parallel], Run]


@pytest.fixture(scope="module")
def whole(pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """whole(layout): the run, made once."""
    made: dict[str, Run] = {}

    def run(parallel: Parallel) -> Run:
        key = layout_name(parallel)
        if key not in made:
            runs = copy_of(house, tmp_path_factory.mktemp("hidden") / "runs")
            pool.run(publish_stage, "distill", recipe_for(runs, parallel, global_batch=GLOBAL_BATCH, hidden=HIDDEN), processes=parallel.processes)
            made[key] = Run(runs)
        return made[key]

    return run


LAYOUTS = [PP2_VPP2, *(pytest.param(parallel, marks=pytest.mark.slow) for parallel in (PP2, TP2_SP, DP2))]


def test_the_weight_of_a_step_is_the_ratio_of_the_losses_of_the_step_before(whole: Whole) -> None:
    """Of the logits' loss to the hidden states', arXiv 2407.14679, section 3."""
    run = whole(ONE)
    kl, hidden, alpha, loss = (run.steps(name) for name in ("forward_kl", "hidden", "alpha", "loss"))
    assert len(alpha) == STEPS
    assert max(alpha) > 1.05 * min(alpha)  # it moves: a weight that stays would pass below
    # α is kept in fp32, the sums come in fp64
    assert [a / b for a, b in zip(kl, hidden, strict=True)][:-1] == pytest.approx(alpha[1:], rel=1e-6)
    assert [a + weight * b for a, b, weight in zip(kl, hidden, alpha, strict=True)] == pytest.approx(loss, rel=1e-12)
    assert hidden[-1] < 0.9 * hidden[0]  # they are trained on


def test_the_first_weight_is_measured_ahead_of_the_first_step_from_its_own_samples(whole: Whole, tmp_path: Path) -> None:
    """Against plain models in fp64 and projections written out by hand: the map of kept channels."""
    run = whole(ONE)
    folder = run.runs / "tiny"
    plan = json.loads((folder / "prune" / "plan.json").read_text())
    student, teacher = PlainModel(folder / "prune" / "checkpoint", TARGET), PlainModel(folder / "import" / "checkpoint", SOURCE)
    settings = recipe_for(run.runs, global_batch=GLOBAL_BATCH).distill
    (tmp_path / "cache").mkdir()
    samples = packed_samples(
        folder / "data" / "train", samples=STEPS * GLOBAL_BATCH, sequence_length=SEQUENCE, seed=settings.seed, cache=tmp_path / "cache"
    )
    tokens, weights = torch.stack([samples[number] for number in range(GLOBAL_BATCH)])[:, :-1], torch.ones(GLOBAL_BATCH, SEQUENCE)
    projection = torch.zeros(SOURCE.hidden, TARGET.hidden, dtype=torch.float64)
    for ours, theirs in enumerate(plan["channels"]):
        projection[theirs, ours] = 1.0
    with torch.no_grad():
        kl = kd_loss(student, teacher, tokens, weights)
        hidden = [hidden_loss(student, teacher, term, projection, "cosine", weights) for term in hidden_terms(HIDDEN, PAIRS)]
    assert relative_difference(run.steps("alpha")[0], kl / sum(hidden)) <= 1e-6  # fp32 sums against fp64
    assert relative_difference(run.steps("hidden")[0], sum(hidden) / weights.sum()) <= 1e-6


@pytest.mark.parametrize("parallel", LAYOUTS, ids=layout_name)
def test_losses_and_weights_of_twenty_steps_agree_in_every_layout(whole: Whole, measured: Record, parallel: Parallel) -> None:
    """Later steps drift by what Adam makes of rounding, as without hidden losses; another first weight would be seen at once."""
    one, found = whole(ONE), whole(parallel)
    for name in ("loss", "forward_kl", "hidden", "alpha", "gradient_norm"):
        pairs = zip(found.steps(name), one.steps(name), strict=True)
        difference = max(relative_difference(a, b) for a, b in pairs)
        assert measured(f"20 steps with hidden losses: {name}", layout_name(parallel), difference) <= 1e-4


@pytest.mark.parametrize("parallel", [ONE, *LAYOUTS], ids=layout_name)
def test_the_published_checkpoint_holds_the_student_alone(whole: Whole, parallel: Parallel) -> None:
    assert set(TorchDistReader(whole(parallel).path / "checkpoint").tensors) == {row.name for row in tensor_table(TARGET)}


def test_an_interrupted_run_goes_on_with_the_weight_that_it_would_have_had(
    pool: Pool, house: Path, whole: Whole, tmp_path: Path, identical: Identical
) -> None:
    expected = whole(PP2)
    recipe = recipe_for(copy_of(house, tmp_path / "runs"), PP2, hidden=HIDDEN)
    pool.run(distill_until, recipe, UNSAVED_STEPS, processes=2)
    pool.run(publish_stage, "distill", recipe, processes=2)
    found = Run(tmp_path / "runs")
    same = all(found.steps(name) == expected.steps(name) for name in ("loss", "alpha", "hidden", "gradient_norm"))
    assert identical("an interrupted and resumed distillation, as the whole one", "pp2 with hidden losses", same)
