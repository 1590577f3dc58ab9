"""A pass in several starts, or in several files, is one pass: under any layouts, to the bit where the blocks' sums are added one by one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.artifact import find_artifact
from minitron_megatron.config.importance import Importance
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import ArtifactError
from minitron_megatron.importance import stage
from minitron_megatron.parallel.world import World
from minitron_megatron.scores.margins import load_margins
from minitron_megatron.scores.merge import merge_files
from minitron_megatron.scores.statistics import Statistics

from .conftest import Identical, Record
from .house import copy_of, inputs_of, publish_stage, recipe_for
from .pool import Pool, WorkerError
from .tiny import DP2, ONE, PP2, PP2_VPP2, TP2, TP2_PP2, layout_name, relative_difference

FP64 = 1e-14  # relative; sums of up to 64 samples in two orders
PP2_DP2 = Parallel(pipeline=2, data=2)


class Interrupted(Exception):
    """Stands for a job that ended."""


def recipe_with(runs: Path, parallel: Parallel = ONE, **importance: Any) -> Recipe:
    recipe = recipe_for(runs, parallel)
    return recipe.model_copy(update={"importance": Importance(**{**recipe.importance.model_dump(), **importance})})


def watch(run: Callable[[], None], stop_behind: int | None = None) -> list[list[int]]:
    """Runs the stage; the sample ids of this process's forward passes. With stop_behind, dies ahead of the segment that follows."""
    seen: list[list[int]] = []
    real, segments = stage.measure, []

    def measure(model: Any, batches: list[Any], advance: Any, *rest: Any) -> Any:
        if len(segments) == stop_behind:
            raise Interrupted
        segments.append(len(batches))
        seen.extend(batch.sample_ids_B.tolist() for batch in batches)
        return real(model, batches, advance, *rest)

    stage.measure = measure
    try:
        run()
    except Interrupted:
        return seen
    finally:
        stage.measure = real
    if stop_behind is not None:
        raise AssertionError(f"whole after {len(segments)} segments")
    return seen


def publish(world: World, recipe: Recipe, stop_behind: int | None = None) -> list[list[int]]:
    return watch(lambda: publish_stage(world, "importance", recipe), stop_behind)


def scores_of(runs: Path) -> Statistics:
    return Statistics.load(runs / "tiny" / "importance" / "scores.safetensors")


def same_bits(actual: Statistics, expected: Statistics) -> bool:
    alike = actual.samples == expected.samples and actual.sums.keys() == expected.sums.keys()
    return alike and all(torch.equal(actual.sums[key], value) for key, value in expected.sums.items())


def without_importance(house: Path, runs: Path) -> Path:
    shutil.rmtree(copy_of(house, runs) / "tiny" / "importance")
    return runs


def flat(groups: list[list[list[int]]]) -> list[int]:
    return sorted({sample for rank in groups for ids in rank for sample in ids})


@pytest.mark.parametrize(
    ("begun", "continued", "left"),
    [(PP2, DP2, 16), (DP2, PP2, 32), (PP2_DP2, ONE, 32), (PP2_VPP2, DP2, 16)],
    ids=["pp2-dp2", "dp2-pp2", "pp2_dp2-one", "pp2_vpp2-dp2"],
)
def test_an_interrupted_pass_continues_under_another_layout_and_gives_the_same_bits(
    pool: Pool, house: Path, tmp_path: Path, identical: Identical, begun: Parallel, continued: Parallel, left: int
) -> None:
    """Of 35 samples, 16 for each data-parallel rank are finished when the first start dies; how often it saves may change in between."""
    runs = without_importance(house, tmp_path / "runs")
    first = pool.run(publish, recipe_with(runs, begun, save_every_samples=1), 1, processes=begun.processes)
    assert flat(first) == list(range(left))
    assert find_artifact(runs / "tiny", "importance") is None
    second = pool.run(publish, recipe_with(runs, continued, save_every_samples=32), processes=continued.processes)
    assert flat(second) == list(range(left, 35))
    name = f"{layout_name(begun)} → {layout_name(continued)}"
    assert identical("importance sums of an interrupted pass, as one process", name, same_bits(scores_of(runs), scores_of(house)))
    kept = {path.name for path in (runs / "tiny" / "importance").iterdir()}
    assert kept == {"manifest.json", "result.json", "status.json", "scores.safetensors", "summary.json"}


def test_a_pass_that_is_interrupted_twice_under_tensor_parallel_continues_twice(pool: Pool, house: Path, tmp_path: Path) -> None:
    """Tensor ranks hold parts of the units, what is finished holds all: one layout's units continue another's."""
    runs = without_importance(house, tmp_path / "runs")
    pool.run(publish, recipe_with(runs, TP2_PP2, save_every_samples=16), 1, processes=4)
    pool.run(publish, recipe_with(runs, ONE, save_every_samples=16), 1, processes=1)
    assert flat(pool.run(publish, recipe_with(runs, TP2, save_every_samples=16), processes=2)) == [32, 33, 34]
    found, expected = scores_of(runs), scores_of(house)
    assert found.samples == expected.samples
    # tensor parallel adds in another order: fp32
    assert max(relative_difference(found.sums[key][:2], expected.sums[key][:2]) for key in expected.sums) <= 1e-5


def test_other_settings_start_from_the_first_sample(pool: Pool, house: Path, tmp_path: Path) -> None:
    runs = without_importance(house, tmp_path / "runs")
    pool.run(publish, recipe_with(runs, save_every_samples=16), 1, processes=1)
    assert flat(pool.run(publish, recipe_with(runs, seed=5), processes=1)) == list(range(35))
    assert not same_bits(scores_of(runs), scores_of(house))


@pytest.fixture(scope="module")
def passes(pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    """(first sample, end) → scores file, each under another layout."""
    folder = tmp_path_factory.mktemp("passes")
    found = {}
    for (first, behind), parallel in {(0, 64): ONE, (0, 32): DP2, (32, 64): PP2, (0, 48): ONE, (48, 64): DP2, (20, 40): DP2}.items():
        recipe = recipe_with(house, parallel, skip_samples=first, samples=behind - first)
        found[first, behind] = folder / f"{first}-{behind}" / "scores.safetensors"
        found[first, behind].parent.mkdir()
        pool.run(measure_pass, recipe, found[first, behind].parent, processes=parallel.processes)
    return found


def measure_pass(world: World, recipe: Recipe, folder: Path) -> None:
    stage.run(recipe, inputs_of(Path(recipe.runs), "import", "data"), folder, world)


def test_merged_passes_are_one_pass_over_all_samples(passes: dict[tuple[int, int], Path], tmp_path: Path, measured: Record) -> None:
    """(b0 + b1) + (b2 + b3) is not ((b0 + b1) + b2) + b3: equal to the rounding of fp64 sums, not to the bit."""
    merged, whole = merge_files([passes[32, 64], passes[0, 32]], tmp_path / "merged"), Statistics.load(passes[0, 64])
    assert merged.samples == whole.samples == 64
    worst = max(relative_difference(merged.sums[key], value) for key, value in whole.sums.items())
    assert measured("merged importance passes", "dp2 + pp2", worst) <= FP64
    assert [(part["first_sample"], part["samples"]) for part in merged.origin["parts"]] == [(0, 32), (32, 32)]
    stored, expected = load_margins(tmp_path / "merged"), load_margins(passes[0, 64])
    assert max(float((stored[name] - value).abs().max()) for name, value in expected.items()) <= FP64


def test_a_pass_over_one_block_is_merged_to_the_bit(passes: dict[tuple[int, int], Path], tmp_path: Path) -> None:
    """((b0 + b1) + b2) + b3 either way."""
    assert same_bits(merge_files([passes[0, 48], passes[48, 64]], tmp_path / "merged"), Statistics.load(passes[0, 64]))


def test_passes_that_share_samples_are_refused(passes: dict[tuple[int, int], Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="both hold samples 20 to 31 of the same data"):
        merge_files([passes[0, 32], passes[20, 40]], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merged_file_prunes_without_an_importance_stage_until_it_changes(
    pool: Pool, house: Path, passes: dict[tuple[int, int], Path], tmp_path: Path
) -> None:
    runs, file = without_importance(house, tmp_path / "runs"), tmp_path / "merged.safetensors"
    merge_files([passes[0, 32], passes[32, 64]], file)
    recipe = recipe_for(runs)
    recipe = recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"scores_file": str(file)})})
    ids = []
    for _ in range(2):
        pool.run(publish_stage, "prune", recipe, processes=1)
        artifact = find_artifact(runs / "tiny", "prune")
        assert artifact is not None and artifact.manifest["inputs"].keys() == {"import"}
        ids.append(artifact.id)
        file.unlink()
        merge_files([passes[0, 48], passes[48, 64]], file)
    assert ids[0] != ids[1]
    own = find_artifact(house / "tiny", "prune")
    assert own is not None and own.id not in ids


def test_scores_of_another_model_and_a_missing_file_are_refused(pool: Pool, house: Path, passes: dict[tuple[int, int], Path], tmp_path: Path) -> None:
    runs, foreign = without_importance(house, tmp_path / "runs"), tmp_path / "foreign.safetensors"
    scores = Statistics.load(passes[0, 32])
    Statistics(scores.arch, scores.samples, scores.sums, {**scores.origin, "model": "another"}).save(foreign)
    for file, message in ((foreign, "was measured on another model"), (tmp_path / "none", "no such file; make it with: minitron importance merge")):
        recipe = recipe_for(runs)
        recipe = recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"scores_file": str(file)})})
        with pytest.raises(WorkerError, match=f"ArtifactError: .*{message}"):
            pool.run(publish_stage, "prune", recipe, processes=1)
