"""Broken on purpose: the comparisons that hold the layouts' claims must fail for each of five mistakes, each in one place of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import functional as F

from minitron_megatron.config.distill import Distill, HiddenLoss
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.distill.hidden import training as hidden_training
from minitron_megatron.importance import stage as importance_stage
from minitron_megatron.importance.accumulate import BlockSums, aggregate_tokens
from minitron_megatron.importance.reduce import SEQUENCE_SHARDED
from minitron_megatron.model import modules
from minitron_megatron.parallel.collectives import Gathering
from minitron_megatron.parallel.world import World
from minitron_megatron.scores.statistics import Key, Statistics
from minitron_megatron.training import output_layer
from minitron_megatron.training.losses import chunk

from .conftest import Record
from .first_step import Answer, FirstStep, Pair, first_step, plain_first_step, run_first_step, settings
from .house import recipe_for
from .pool import Pool
from .test_importance import naive as naive
from .test_importance import run_importance, worst
from .tiny import LLAMA, ONE, PP2, TP2, TP2_SP, layout_name, relative_difference, worst_difference

pytestmark = pytest.mark.slow
KL_ALONE = settings()
WITH_HIDDEN = settings(hidden=HiddenLoss(pairs=[(2, 1), (5, 4)], weight=0.37))


@contextmanager
def a_missing_reduction() -> Iterator[None]:
    """The loss sees this tensor rank's part of the vocabulary alone."""
    with mock.patch.object(chunk, "begin_gather_first", lambda x, group: Gathering(x.expand(group.size(), *x.shape), None)):
        yield


@contextmanager
def a_wrong_group() -> Iterator[None]:
    """The loss is combined over data-parallel instead of tensor ranks."""

    def over_data_ranks(*arguments: Any, group: dist.ProcessGroup, **keywords: Any) -> Any:
        return real(*arguments, group=parallel_state.get_data_parallel_group(), **keywords)

    real = output_layer.fused_distillation_loss
    with mock.patch.object(output_layer, "fused_distillation_loss", over_data_ranks):
        yield


@contextmanager
def a_swapped_head_layout() -> Iterator[None]:
    """Query head h reads key h mod groups, not key h / heads a group."""

    def tiled(query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool, **keywords: Any) -> Tensor:
        copies = query.shape[1] // key.shape[1]
        return F.scaled_dot_product_attention(query, key.repeat(1, copies, 1, 1), value.repeat(1, copies, 1, 1), **keywords)

    with mock.patch.object(modules, "F", mock.Mock(wraps=F, scaled_dot_product_attention=tiled)):
        yield


@contextmanager
def a_stages_alpha() -> Iterator[None]:
    """The first stage weighs its hidden losses by 1."""

    def with_its_own(chunk: Any, terms: Any, kind: Any, alpha: Callable[[], Tensor], *, stage_number: int) -> Any:
        return real(chunk, terms, kind, (lambda: torch.ones(())) if stage_number == 0 else alpha, stage_number=stage_number)

    real = hidden_training.HiddenLosses
    with mock.patch.object(hidden_training, "HiddenLosses", with_its_own):
        yield


@contextmanager
def a_square_before_the_sum_is_complete() -> Iterator[None]:
    """Under sequence parallelism each rank squares its own part of a sample, and the squares are added."""

    def add(self: BlockSums, token_sums: Mapping[Key, Tensor], tokens: int, sample_ids: list[int]) -> None:
        for key, token_sums_3BC in token_sums.items():
            aggregates_3BC = aggregate_tokens(token_sums_3BC.double(), tokens)
            moments_32BC = torch.stack([aggregates_3BC, aggregates_3BC.square()], dim=1)
            if key[1] in SEQUENCE_SHARDED:
                dist.all_reduce(moments_32BC, group=parallel_state.get_tensor_model_parallel_group())
            self._add((key,), [token_sums_3BC.shape[-1]], moments_32BC.movedim(2, 0), sample_ids)

    with mock.patch.object(importance_stage, "complete_over_sequence", lambda found, layout: None), mock.patch.object(BlockSums, "add", add):
        yield


@dataclass(frozen=True)
class Mistake:
    where: str
    make: Callable[[], Any]
    parallel: Parallel
    distill: Distill = KL_ALONE


MISTAKES = [
    Mistake("a missing reduction: training/losses/chunk.py gathers nothing", a_missing_reduction, TP2),
    Mistake("a wrong group: training/output_layer.py, data for tensor ranks", a_wrong_group, Parallel(tensor=2, data=2)),
    Mistake("a swapped head layout: model/modules.py, keys tiled over heads", a_swapped_head_layout, ONE),
    Mistake("a stage's α: distill/hidden/training.py, the first stage's is 1", a_stages_alpha, PP2, WITH_HIDDEN),
]


def broken_first_step(make: Callable[[], Any], world: World, parallel: Parallel, pair: Pair, distill: Distill, written: Path) -> Answer:
    with make():
        return first_step(world, parallel, pair, distill, written)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(LLAMA, tmp_path_factory.mktemp("pair")).written()


def difference(found: FirstStep, expected: FirstStep) -> float:
    """What the tests of the first step compare, the worst of loss and gradients."""
    return max(relative_difference(found.kl, expected.kl), worst_difference(found.gradients, expected.gradients)[0])


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.make.__name__)
def test_the_first_steps_comparison_fails(pool: Pool, pair: Pair, tmp_path: Path, broken: Record, mistake: Mistake) -> None:
    """Whole first, so that it is the mistake that fails."""
    expected = plain_first_step(pair, mistake.distill)
    whole = run_first_step(pool, mistake.parallel, pair, mistake.distill, tmp_path / "whole")
    assert difference(whole, expected) <= 1e-5
    found = run_first_step(pool, mistake.parallel, pair, mistake.distill, tmp_path / "broken", partial(broken_first_step, mistake.make))
    assert broken(mistake.where, layout_name(mistake.parallel), difference(found, expected)) > 1e-5


def broken_importance(world: World, recipe: Recipe, folder: Path) -> None:
    with a_square_before_the_sum_is_complete():
        run_importance(world, recipe, folder)


def test_importances_comparison_fails(pool: Pool, house: Path, tmp_path: Path, broken: Record, naive: dict[Key, Tensor]) -> None:
    recipe, differences = recipe_for(house, TP2_SP), []
    for function in (run_importance, broken_importance):
        folder = tmp_path / function.__name__
        folder.mkdir()
        pool.run(function, recipe, folder, processes=2)
        differences.append(worst(Statistics.load(folder / "scores.safetensors").sums, naive))
    assert differences[0] <= 1e-5
    where = "a square before a sample's sum is complete: importance/stage.py"
    assert broken(where, layout_name(TP2_SP), differences[1]) > 1e-5
