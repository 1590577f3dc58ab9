"""Block Influence of blocks that reach over pipeline stages: the plain model's cosines, and the same bits wherever a block's input travels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from minitron_megatron.config.importance import Importance
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.data.samples import packed_samples
from minitron_megatron.importance import stage as importance
from minitron_megatron.importance.blocks import crossing
from minitron_megatron.parallel.world import World
from minitron_megatron.scores.influence import influence_of_blocks
from minitron_megatron.scores.merge import merge_files
from minitron_megatron.scores.statistics import Statistics, influence_axis

from .conftest import Identical, Record
from .house import CALIBRATION, SOURCE, inputs_of, recipe_for
from .plain_model import PlainModel
from .pool import Pool
from .tiny import DP2, ONE, PP2, PP2_VPP2, SEQUENCE, TP2_PP2, TP2_SP, layout_name, name_of, relative_difference

SIZES = [2, 3, 5]
"""Of 6 layers: within a stage of two, over two, over all four."""
PP4 = Parallel(pipeline=4)
PP2_VPP3_DP2 = Parallel(pipeline=2, virtual=3, data=2)
FP32 = 1e-5  # another order of additions


def slow(*layouts: Parallel) -> list[Any]:
    return [pytest.param(layout, marks=pytest.mark.slow) for layout in layouts]


def run_importance(world: World, runs: Path, settings: Importance, parallel: Parallel, folder: Path) -> None:
    recipe = recipe_for(runs, parallel).model_copy(update={"importance": settings})
    importance.run(recipe, inputs_of(runs, "import", "data"), folder, world)


def measure(pool: Pool, house: Path, folder: Path, parallel: Parallel, **changes: int) -> Statistics:
    folder.mkdir()
    settings = Importance(**{"samples": CALIBRATION, "sequence_length": SEQUENCE, "block_sizes": SIZES, **changes})  # type: ignore[arg-type]
    pool.run(run_importance, house, settings, parallel, folder, processes=parallel.processes)
    found = Statistics.load(folder / "scores.safetensors")
    axes = [influence_axis(size) for size in (1, *SIZES)]
    return replace(found, sums={key: value for key, value in found.sums.items() if key[1] in axes})


@pytest.fixture(scope="module")
def one_process(pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    return measure(pool, house, tmp_path_factory.mktemp("blocks") / "one", ONE)


@pytest.fixture(scope="module")
def cosines(house: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], torch.Tensor]:
    """(first layer, layers) → [samples] mean cosine of a plain fp64 model's residual stream on both ends."""
    cache = tmp_path_factory.mktemp("order")
    samples = packed_samples(house / "tiny" / "data" / "train", samples=CALIBRATION, sequence_length=SEQUENCE, seed=1234, cache=cache, repeat=False)
    plain = PlainModel(house / "tiny" / "import" / "checkpoint", SOURCE)
    with torch.no_grad():
        plain.hidden(torch.stack([samples[sample][:-1] for sample in range(CALIBRATION)]))
    states = plain.residuals
    blocks = ((first, size) for size in (1, *SIZES) for first in range(SOURCE.layers - size + 1))
    return {(first, size): F.cosine_similarity(states[first], states[first + size], dim=-1).mean(-1) for first, size in blocks}


def test_blocks_equal_the_plain_models_cosines(one_process: Statistics, cosines: dict[tuple[int, int], torch.Tensor], measured: Record) -> None:
    assert one_process.sums.keys() == {(first, influence_axis(size)) for first, size in cosines}
    worst = 0.0
    for (first, size), cosine_N in cosines.items():
        influence, error = (values[first] for values in influence_of_blocks(one_process, size))
        worst = max(worst, relative_difference(influence, 1 - cosine_N.mean()))
        assert float(error) == pytest.approx(float(cosine_N.std() / CALIBRATION**0.5), rel=1e-4)  # Σ² − N·mean², of fp32 cosines
    assert measured("Block Influence of blocks against plain fp64", "one", worst) <= FP32


@pytest.mark.parametrize("parallel", [*slow(DP2, PP2, PP2_VPP3_DP2), PP2_VPP2, PP4], ids=name_of)
def test_a_blocks_input_travels_through_stages_and_changes_no_bit(
    pool: Pool, house: Path, one_process: Statistics, tmp_path: Path, identical: Identical, parallel: Parallel
) -> None:
    found = measure(pool, house, tmp_path / "scores", parallel).sums
    same = found.keys() == one_process.sums.keys() and all(torch.equal(found[key], value) for key, value in one_process.sums.items())
    assert identical("Block Influence of blocks, as one process", layout_name(parallel), same)


@pytest.mark.parametrize("parallel", [*slow(TP2_SP), TP2_PP2], ids=name_of)
def test_parts_of_the_sequence_add_up(pool: Pool, house: Path, one_process: Statistics, tmp_path: Path, measured: Record, parallel: Parallel) -> None:
    found = measure(pool, house, tmp_path / "scores", parallel).sums
    worst = max(relative_difference(found[key], value) for key, value in one_process.sums.items())
    assert measured("Block Influence of blocks, as one process", layout_name(parallel), worst) <= FP32


def test_passes_over_other_samples_are_merged_with_their_blocks(pool: Pool, house: Path, one_process: Statistics, tmp_path: Path) -> None:
    measure(pool, house, tmp_path / "a", PP2_VPP2, samples=32)
    measure(pool, house, tmp_path / "b", DP2, skip_samples=32, samples=CALIBRATION - 32)
    merged = merge_files([tmp_path / "a" / "scores.safetensors", tmp_path / "b" / "scores.safetensors"], tmp_path / "merged")
    assert all(torch.equal(merged.sums[key], value) for key, value in one_process.sums.items())


def test_every_state_crosses_a_border_only_while_a_block_asks_for_it() -> None:
    """By brute force over all blocks: those that begin below the border and end behind it."""

    def blocks(sizes: list[int], layers: int) -> Iterator[tuple[int, int]]:
        yield from ((first, first + size) for size in sizes for first in range(layers - size + 1))

    for border in range(1, 7):
        expected = {first for first, end in blocks(SIZES, 7) if first < border < end}
        assert crossing(border, SIZES, 7) == sorted(expected)
    assert crossing(3, [1], 7) == [] and crossing(6, [2], 6) == []
