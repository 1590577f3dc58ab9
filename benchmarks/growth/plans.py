"""Curves of what only counts and ranks: plans, scores files, searches, schedules, logs."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from growth.curve import Curve, Work

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.schema import Recipe
from minitron_megatron.parallel.split import EndWork, layer_works, split_layers
from minitron_megatron.prune.plan import make_plan
from minitron_megatron.schedule.simulate import StageWorks, simulate
from minitron_megatron.scores.merge import merge
from minitron_megatron.scores.statistics import Statistics
from minitron_megatron.scores.units import random_scores
from minitron_megatron.search.ranking import ranking_of
from minitron_megatron.search.shortlist import KeptParameters, choose_diverse
from minitron_megatron.search.survey import Candidate, survey
from minitron_megatron.training.metrics import MetricsLog, keep_until

LARGE = Architecture("mistral", 32, 4096, 32, 8, 128, 14336, 32768, False, 4096, 1e-5, 10000.0)
NARROW = Architecture("llama", 32, 64, 4, 2, 16, 64, 128, True, 64, 1e-5, 10000.0)
WHY_SPLIT = "every size of the first and the last stage is tried, which is exact; once when a model is built, and models have at most 126 layers"
WHY_UNEVEN = "an exact dynamic program over layers × layers; once when a model is built, and models have at most 126 layers"
WHY_PAIRS = "ranking.json tells every pair of finalists; each of them has cost minutes of training"


def planned(size: int, folder: Path, *, quantity: str) -> Work:
    """Scores of all units to a plan, with its margins, half of each axis kept."""
    arch = NARROW.resized(**{quantity: size})
    scores = random_scores(arch, 0)
    return lambda: make_plan(scores, arch, arch.resized(**{axis: getattr(arch, axis) // 2 for axis in ("layers", "hidden", "ffn", "heads")}))


def planned_globally(size: int, folder: Path) -> Work:
    """FFN widths out of one ranking over all layers."""
    arch = NARROW.resized(layers=size, ffn=256)
    scores = random_scores(arch, 0)
    return lambda: make_plan(scores, arch, arch.resized(ffn=128), global_ffn_multiple=8)


def split(size: int, folder: Path, *, uneven: bool) -> Work:
    works = layer_works(NARROW.resized(layers=size, ffn=[8 + layer % 5 for layer in range(size)])) if uneven else ()
    return lambda: split_layers(size, 8, "cost", EndWork(0.3, 4.2), works)


def merged(size: int, folder: Path) -> Work:
    """Scores files of as many shards of the calibration data, in memory."""

    def part(number: int) -> Statistics:
        origin = {"data": "d", "seed": 1, "first_sample": 16 * number, "samples": 16}
        sums = {(layer, "ffn"): torch.ones(3, 2, 256, dtype=torch.float64) for layer in range(8)}
        return Statistics(NARROW, 16, sums, {"model": "m", "sequence_length": 8, "precision": "fp32", "parts": [origin]})

    parts = {str(number): part(number) for number in range(size)}
    return lambda: merge(parts)


def surveyed(size: int, folder: Path) -> Work:
    """Every candidate with its figures, and whether the recipe can make it; all are within the budgets."""
    recipe = Recipe.model_validate(
        {
            "name": "growth",
            "platform": "cpu",
            "precision": "fp32",
            "model": {"path": "somewhere"},
            "data": {"train": ["x"]},
            "importance": {"sequence_length": 32},
            "distill": {"steps": 500, "sequence_length": 32, "global_batch": 4},
            "evaluate": {"sequence_length": 32},
            "search": {
                "space": {"layers": {"min": 23, "max": 32, "step": 1}, "ffn": list(range(1000, 1000 + size // 10))},
                "latency": {"gpu": "H100_SXM"},
            },
        }
    )
    assert recipe.search
    search = recipe.search

    def work() -> None:
        assert len(survey(recipe, search, LARGE).survivors) == size

    return work


def shortlisted(size: int, folder: Path) -> Work:
    """The proxy of each candidate and eight that lie far apart."""
    architectures = [LARGE.resized(layers=23 + number % 10, ffn=1000 + number // 10) for number in range(size)]
    proxy = KeptParameters(LARGE)
    return lambda: choose_diverse(architectures, [proxy(arch) for arch in architectures], count=8, pool=0.5)


@dataclass(frozen=True)
class Trained:
    """A candidate with losses, without a folder."""

    name: str
    candidate: Candidate
    values_W: np.ndarray[Any, np.dtype[np.float64]]

    def losses(self) -> dict[int, dict[str, Any]]:
        return {step: {"cross_entropy": self.values_W / step} for step in (1, 2)}


def ranked(size: int, folder: Path) -> Work:
    draw = np.random.default_rng(0)
    trials: list[Any] = [Trained(f"c{number}", Candidate(LARGE, LARGE, {}, {}), draw.random(64)) for number in range(size)]
    return lambda: ranking_of(trials, rank_by="cross_entropy", rounds=[1, 2])


def scheduled(size: int, folder: Path, *, quantity: str) -> Work:
    ranks, micro_batches = (size, 64) if quantity == "ranks" else (8, size)
    works = StageWorks((1.0,) * ranks, (1.0,) * ranks, (2.0,) * ranks)
    return lambda: simulate(works, micro_batches, "teacher_pipelined")


RECORD = {"step": 0, "steps": 1, "loss": 1.0, "forward_kl": 1.0, "gradient_norm": 1.0, "learning_rate": 1e-4, "seconds": 1.0}


def logged(size: int, folder: Path) -> Work:
    """metrics.jsonl and TensorBoard of so many steps."""

    def work() -> None:
        shutil.rmtree(folder / "log", ignore_errors=True)
        (folder / "log").mkdir()
        log = MetricsLog(folder / "log", finished_steps=0, wandb=None, run_name="growth")
        for step in range(size):
            log.write({**RECORD, "step": step})
        log.close()

    return work


def continued(size: int, folder: Path) -> Work:
    """What the start of a continued run does to the log of so many steps."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps({**RECORD, "step": step}) + "\n" for step in range(size)))
    return lambda: keep_until(folder / "metrics.jsonl", size)


CANDIDATES = (100, 1000, 10_000, 100_000)
CURVES = [
    Curve("prune plan", "ffn", (4096, 8192, 16384, 32768, 65536), partial(planned, quantity="ffn")),
    Curve("prune plan", "hidden", (65536, 131072, 262144, 524288), partial(planned, quantity="hidden")),
    Curve("prune plan", "layers", (64, 128, 256, 512), partial(planned, quantity="layers")),
    Curve("prune plan, widths by one ranking", "layers", (64, 128, 256, 512), planned_globally),
    Curve("layers to pipeline stages", "layers", (32, 64, 128, 256), partial(split, uneven=False), WHY_SPLIT),
    Curve("uneven layers to pipeline stages", "layers", (32, 64, 128, 256), partial(split, uneven=True), WHY_UNEVEN),
    Curve("merge of scores", "files", (16, 64, 256, 1024), merged),
    Curve("search: survey", "candidates", CANDIDATES, surveyed),
    Curve("search: shortlist", "candidates", CANDIDATES, shortlisted),
    Curve("search: ranking", "trained candidates", (8, 16, 32, 64, 128), ranked, WHY_PAIRS),
    Curve("plan --schedule", "micro-batches", (64, 256, 1024, 4096), partial(scheduled, quantity="micro-batches")),
    Curve("plan --schedule", "ranks", (4, 8, 16, 32, 64), partial(scheduled, quantity="ranks")),
    Curve("log of a run", "steps", (500, 1000, 2000, 4000), logged),
    Curve("log, continued", "steps", (10_000, 20_000, 40_000, 80_000), continued),
]
