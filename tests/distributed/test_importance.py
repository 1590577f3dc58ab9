"""Importance under every layout: the same bits where a sample's arithmetic is the same, and always the naive statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace as replace_field
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_layers import fused_layers
from torch import Tensor

from minitron_megatron.config.criteria import DEFAULT_RANKING, Criteria, Ranking
from minitron_megatron.config.importance import ImportanceAggregation
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.samples import packed_samples
from minitron_megatron.errors import ArtifactError
from minitron_megatron.importance import stage as importance
from minitron_megatron.parallel.world import World
from minitron_megatron.prune.plan import make_plan, top
from minitron_megatron.scores.margins import load_margins, unit_margins
from minitron_megatron.scores.statistics import Statistics, measured_keys
from minitron_megatron.scores.units import UnitScores, activation_scores

from .conftest import Identical, Record
from .house import CALIBRATION, SOURCE, TARGET, inputs_of, recipe_for
from .plain_model import PlainModel, naive_statistics
from .pool import Pool
from .tiny import CP2, DP2, ONE, PP2, PP2_EVEN, PP2_VPP2, SEQUENCE, TP2, TP2_PP2, TP2_SP, layout_name, name_of, relative_difference

FP32 = 1e-5  # another order of additions over 16 tokens (design: numbers that must not move)
P1 = Criteria(ffn="before_activation", heads="per_token_norm", channels="all_norms")
OURS = Criteria(heads="behind_projection")
Sums = dict[tuple[int, str], Tensor]


def run_importance(world: World, recipe: Recipe, folder: Path) -> None:
    importance.run(recipe, inputs_of(Path(recipe.runs), "import", "data"), folder, world)


def measure(
    pool: Pool,
    house: Path,
    folder: Path,
    parallel: Parallel,
    *,
    micro_batch: int = 1,
    precision: str = "fp32",
    **importance: Any,
) -> Sums:
    recipe = recipe_for(house, parallel, precision, micro_batch=micro_batch)
    recipe = recipe.model_copy(update={"importance": recipe.importance.model_copy(update=importance)})
    folder.mkdir()
    pool.run(run_importance, recipe, folder, processes=parallel.processes)
    return Statistics.load(folder / "scores.safetensors").sums


def worst(actual: Sums, expected: Sums) -> float:
    """Over every layer, axis and aggregate: the largest difference over the aggregate's largest value."""
    assert actual.keys() == expected.keys()
    pairs = [(actual[key].reshape(-1, actual[key].shape[-1]), expected[key].reshape(-1, expected[key].shape[-1])) for key in expected]
    return max(relative_difference(a, b) for actual_rows, rows in pairs for a, b in zip(actual_rows, rows, strict=True))


def part(sums: Sums, aggregates: list[int]) -> Sums:
    return {key: value[aggregates] if value.dim() == 3 else value for key, value in sums.items()}


def same_bits(actual: Sums, expected: Sums) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def one_process(pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Sums:
    return measure(pool, house, tmp_path_factory.mktemp("importance") / "one", ONE)


@pytest.fixture(scope="module")
def naive(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Sums:
    samples = packed_samples(
        house / "tiny" / "data" / "train",
        samples=CALIBRATION,
        sequence_length=SEQUENCE,
        seed=1234,
        cache=tmp_path_factory.mktemp("order"),
        repeat=False,
    )
    tokens = torch.stack([samples[sample][:-1] for sample in range(CALIBRATION)])
    return naive_statistics(PlainModel(house / "tiny" / "import" / "checkpoint", SOURCE), tokens)


def test_statistics_equal_a_plain_model_in_fp64_one_sample_after_another(one_process: Sums, naive: Sums, measured: Record) -> None:
    assert measured("importance against plain fp64", "one", worst(one_process, naive)) <= FP32


@pytest.mark.parametrize("parallel", [DP2, CP2, PP2, PP2_EVEN, PP2_VPP2, Parallel(data=3), Parallel(pipeline=2, virtual=3, data=2)], ids=layout_name)
def test_data_and_pipeline_parallel_give_the_same_bits(
    pool: Pool, house: Path, one_process: Sums, tmp_path: Path, identical: Identical, parallel: Parallel
) -> None:
    same = same_bits(measure(pool, house, tmp_path / "scores", parallel), one_process)
    assert identical("importance sums, as one process", layout_name(parallel), same)


def run_fused_importance(world: World, recipe: Recipe, folder: Path) -> None:
    with fused_layers():
        run_importance(world, recipe, folder)


def test_norms_inside_linear_layers_give_the_same_statistics(pool: Pool, house: Path, naive: Sums, tmp_path: Path, measured: Record) -> None:
    """As Transformer Engine keeps them, from a checkpoint that was written without such layers."""
    recipe = recipe_for(house, TP2_SP, "fp32")
    (tmp_path / "scores").mkdir()
    pool.run(run_fused_importance, recipe, tmp_path / "scores", processes=2)
    found = Statistics.load(tmp_path / "scores" / "scores.safetensors").sums
    assert measured("importance against plain fp64, norms inside linear layers", "tp2_sp", worst(found, naive)) <= FP32


def test_bf16_gives_the_same_bits_on_two_stages_and_is_close_on_two_tensor_ranks(pool: Pool, house: Path, tmp_path: Path, measured: Record) -> None:
    one, stages, tensor = (measure(pool, house, tmp_path / layout_name(at), at, precision="bf16") for at in (ONE, PP2, TP2))
    assert same_bits(stages, one)
    for axis in ("ffn", "ffn_before_activation", "head_norms", "head_contributions"):
        found, expected = (sums[0, axis][0, 1].sqrt() for sums in (tensor, one))
        # the default aggregation of the design's claim: bf16 products rounded at other places, 8 bits of mantissa
        assert measured(f"bf16 {axis} (l2 of mean), layer 0", "tp2", relative_difference(found, expected)) <= 1e-2


@pytest.fixture(scope="module", params=[TP2, TP2_SP, TP2_PP2], ids=layout_name)
def on_tensor_ranks(request: pytest.FixtureRequest, pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Sums]:
    """A layout's name, and its sums."""
    name = layout_name(request.param)
    return name, measure(pool, house, tmp_path_factory.mktemp(name) / "scores", request.param)


def test_tensor_and_sequence_parallel_change_only_the_order_of_additions(
    on_tensor_ranks: tuple[str, Sums], one_process: Sums, naive: Sums, measured: Record
) -> None:
    name, found = on_tensor_ranks
    assert measured("importance against one process", name, worst(found, one_process)) <= FP32
    assert measured("importance against plain fp64", name, worst(found, naive)) <= FP32


@pytest.mark.parametrize("ranking", [DEFAULT_RANKING, Ranking(criteria=P1), Ranking(criteria=OURS)], ids=["default", "p1", "ours"])
def test_tensor_and_sequence_parallel_keep_the_same_units_but_those_within_the_tolerance_of_the_cut(
    on_tensor_ranks: tuple[str, Sums], house: Path, one_process: Sums, ranking: Ranking
) -> None:
    """By the margins in one process's file: two scores that are each off by the tolerance change places where their gap is below twice of it."""
    expected, theirs = scores_of(one_process, ranking), kept_units(scores_of(on_tensor_ranks[1], ranking))
    margins = load_margins(house / "tiny" / "importance" / "scores.safetensors")
    if ranking != DEFAULT_RANKING:  # which the file's margins are of
        margins = unit_margins(expected, SOURCE.kv_groups)
    for name, kept in kept_units(expected).items():
        for scores, gaps, ours, units in ranked_together(expected, margins, name, kept):
            swapped = set(ours) ^ (set(theirs[name]) & units)
            assert all(gap_to_the_other_side(scores, gaps, len(ours), unit) <= 2 * FP32 for unit in swapped), name


@pytest.mark.parametrize(("parallel", "micro_batch"), [(ONE, 4), (PP2, 4), (PP2_VPP2, 4), (DP2, 5), (TP2_SP, 16)], ids=name_of)
def test_the_size_of_a_micro_batch_does_not_matter_even_when_the_last_one_is_smaller(
    pool: Pool, house: Path, one_process: Sums, tmp_path: Path, measured: Record, parallel: Parallel, micro_batch: int
) -> None:
    found = measure(pool, house, tmp_path / "scores", parallel, micro_batch=micro_batch)
    steady, variance = ((part(found, rows), part(one_process, rows)) for rows in ([0, 1], [2]))
    layout = f"{layout_name(parallel)}, {micro_batch}"
    # matmuls of other sizes sum in another order; a variance is a small difference of large sums
    assert measured("importance, micro-batch: mean, l2", layout, worst(*steady)) <= (FP32 if parallel.tensor > 1 else 1e-6)
    assert measured("importance, micro-batch: variance", layout, worst(*variance)) <= FP32


def test_a_data_parallel_rank_without_samples_takes_part(pool: Pool, house: Path, tmp_path: Path) -> None:
    """10 samples are one block, which one rank owns."""
    assert same_bits(*(measure(pool, house, tmp_path / layout_name(at), at, samples=10) for at in (DP2, ONE)))


@pytest.mark.parametrize("parallel", [ONE, TP2_PP2], ids=layout_name)
def test_the_default_sums_give_the_default_scores_and_no_others(
    pool: Pool, house: Path, one_process: Sums, tmp_path: Path, measured: Record, parallel: Parallel
) -> None:
    found = measure(pool, house, tmp_path / "scores", parallel, sums="default")
    assert found.keys() == measured_keys(SOURCE, kept="default")
    expected = {key: value[:1] if value.dim() == 3 else value for key, value in one_process.items() if key in found}
    assert measured("default importance sums", layout_name(parallel), worst(found, expected)) <= FP32
    for ranking in (Ranking(ImportanceAggregation(sequence="l2")), Ranking(criteria=P1), Ranking(criteria=Criteria(channels="all_norms"))):
        with pytest.raises(ArtifactError, match=r"importance\.sums=all"):
            scores_of(found, ranking)
    ours, theirs = scores_of(found, DEFAULT_RANKING), scores_of(one_process, DEFAULT_RANKING)
    assert max(relative_difference(torch.stack(getattr(ours, axis)), torch.stack(getattr(theirs, axis))) for axis in ("ffn", "heads")) <= FP32
    assert relative_difference(ours.channels, theirs.channels) <= FP32


def scores_of(sums: Sums, ranking: Ranking) -> UnitScores:
    return activation_scores(Statistics(SOURCE, CALIBRATION, sums), ranking)


def kept_units(scores: UnitScores) -> dict[str, list[int]]:
    """Of the plan; heads and neurons of every source layer, whether the layer is kept or not."""
    plan = make_plan(scores, SOURCE, replace_field(TARGET, layers=SOURCE.layers))
    kept = {f"ffn {layer}": units for layer, units in plan.ffn.items()} | {f"heads {layer}": units for layer, units in plan.heads.items()}
    kept |= {f"kv_groups {layer}": top(groups, 1) for layer, groups in enumerate(scores.kv_groups)}
    return {**kept, "channels": plan.channels, "layers": make_plan(scores, SOURCE, TARGET).kept_layers}


def ranked_together(
    scores: UnitScores, margins: dict[str, Tensor], name: str, kept: list[int]
) -> Iterator[tuple[dict[int, float], list[float], list[int], set[int]]]:
    """The scores, margins, kept units and all units of what is ranked together: an axis of a layer, or one group of its heads."""
    axis, _, layer = name.partition(" ")
    values = (getattr(scores, axis)[int(layer)] if layer else getattr(scores, axis)).tolist()
    rows = margins[f"{axis}.{layer}" if layer else axis]
    size = SOURCE.heads_per_group if axis == "heads" else len(values)
    for group, gaps in enumerate(rows.view(-1, size - 1).tolist()):
        units = set(range(group * size, (group + 1) * size))
        yield {unit: values[unit] for unit in units}, gaps, [unit for unit in kept if unit in units], units


def gap_to_the_other_side(scores: dict[int, float], gaps: list[float], kept: int, unit: int) -> float:
    """Relative gap between a kept unit and the best that goes, or a unit that goes and the last that is kept: margins add up."""
    rank = sorted(scores, key=lambda other: (-scores[other], other)).index(unit)
    return sum(gaps[rank:kept]) if rank < kept else sum(gaps[kept - 1 : rank])
