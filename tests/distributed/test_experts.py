"""Models with experts: checkpoints, the first distillation step and importance, with experts on several ranks, against one process and plain fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.monkeypatch import MonkeyPatch
from torch import Tensor

from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.checkpoint.torch_dist import MegatronSource, TorchDistReader, weights_digest
from minitron_megatron.config.distill import Training
from minitron_megatron.config.importance import Importance
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.prune import Prune, Target
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.batches import FILLING, collate
from minitron_megatron.data.samples import packed_samples
from minitron_megatron.evaluate import compare as comparison
from minitron_megatron.model import scoring
from minitron_megatron.model.build import build_model
from minitron_megatron.model.experts import same_number_of_passes
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.scores.merge import merge_files
from minitron_megatron.scores.statistics import Statistics

from .conftest import Record
from .first_step import FirstStep, Pair, first_step, plain_first_step, run_first_step, settings
from .house import CALIBRATION, STEPS, build_house, copy_of, publish_stage, recipe_for
from .plain_model import PlainModel, naive_statistics
from .pool import Pool
from .test_checkpoints import SAMPLES, load_run_save
from .test_distill import JUST_SAVED, UNSAVED_STEPS, Run, distill_until
from .test_first_step import check
from .test_importance import FP32, Sums, part, run_importance, same_bits, worst
from .test_importance_passes import flat, publish, scores_of
from .tiny import (
    DP2,
    EP2,
    EP2_OF_DP4,
    EP2_PP2,
    MIXTRAL,
    ONE,
    PP2,
    QWEN3_MOE,
    SEQUENCE,
    RandomSamples,
    layout_name,
    name_of,
    relative_difference,
    teacher_of,
)

EP2_PP2_VPP2 = Parallel(pipeline=2, virtual=2, data=2, expert=2)
SHAPES = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "deep": MIXTRAL.resized(layers=5)}
LAYOUTS = [(shape, layout) for shape in ("mixtral", "qwen3_moe") for layout in (ONE, EP2)]
LAYOUTS += [("qwen3_moe", EP2_PP2), ("mixtral", EP2_OF_DP4), ("deep", EP2_PP2_VPP2)]
SLOW_LAYOUTS = [pytest.param(shape, PP2, marks=pytest.mark.slow) for shape in ("mixtral", "qwen3_moe")]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {name: Pair(arch, tmp_path_factory.mktemp(name)).written() for name, arch in SHAPES.items()}


@pytest.mark.parametrize(("shape", "parallel"), LAYOUTS + SLOW_LAYOUTS, ids=name_of)
def test_a_layout_gives_the_states_of_one_plain_model_and_writes_the_same_weights(
    pool: Pool, measured: Record, pairs: dict[str, Pair], tmp_path: Path, shape: str, parallel: Parallel
) -> None:
    source, arch = pairs[shape].folder / "student", SHAPES[shape]
    answers = pool.run(load_run_save, parallel, arch, source, tmp_path / "back", processes=parallel.processes)
    plain, tokens = PlainModel(source, arch), RandomSamples(SAMPLES).tokens[:, :-1]
    with torch.no_grad():
        expected = plain.logits(tokens)
    differences = [relative_difference(answer[1], expected) for answer in answers if answer is not None]
    assert len(differences) == parallel.data
    assert measured("experts: logits against plain fp64", layout_name(parallel), max(differences)) <= 1e-5  # fp32 against fp64
    assert TorchDistReader(tmp_path / "back").tensors.keys() == TorchDistReader(source).tensors.keys()
    assert weights_digest(MegatronSource(tmp_path / "back", arch)) == weights_digest(MegatronSource(source, arch))


@pytest.fixture(scope="module")
def expected(pairs: dict[str, Pair]) -> dict[str, FirstStep]:
    return {name: plain_first_step(pair, settings()) for name, pair in pairs.items()}


@pytest.fixture(scope="module")
def one_process(pool: Pool, pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> dict[str, FirstStep]:
    folder = tmp_path_factory.mktemp("one_process")
    return {name: run_first_step(pool, ONE, pair, settings(), folder / name) for name, pair in pairs.items()}


@pytest.mark.parametrize(("shape", "parallel"), [*[case for case in LAYOUTS if case[1] != ONE], ("mixtral", DP2), *SLOW_LAYOUTS], ids=name_of)
def test_loss_gradients_and_their_norm_of_the_first_step_equal_a_plain_computation_and_one_process(
    pool: Pool,
    measured: Record,
    pairs: dict[str, Pair],
    expected: dict[str, FirstStep],
    one_process: dict[str, FirstStep],
    tmp_path: Path,
    shape: str,
    parallel: Parallel,
) -> None:
    distill = settings(micro_batch=1) if parallel.data == 4 else settings()
    found = run_first_step(pool, parallel, pairs[shape], distill, tmp_path / "gradients")
    check(found, expected[shape], measured, layout_name(parallel), "experts: first step, plain fp64")
    check(found, one_process[shape], measured, layout_name(parallel), "experts: first step, one process")


@pytest.mark.parametrize("parallel", [pytest.param(EP2, marks=pytest.mark.slow), EP2_OF_DP4], ids=layout_name)
def test_overlaps_change_neither_loss_nor_gradients_of_experts(
    pool: Pool, measured: Record, pairs: dict[str, Pair], expected: dict[str, FirstStep], tmp_path: Path, parallel: Parallel
) -> None:
    """Experts have buffers of their own: reduced over the ranks that hold the same ones, over none where all are shared out."""
    machinery = Training(overlap_grad_reduce=True, overlap_param_gather=True)
    found = run_first_step(pool, parallel, pairs["mixtral"], settings(micro_batch=1), tmp_path / "gradients", partial(first_step, training=machinery))
    check(found, expected["mixtral"], measured, f"{layout_name(parallel)}, overlaps", "experts: first step, plain fp64")


def fill(world: World, parallel: Parallel) -> list[tuple[tuple[int, ...], list[int], float]]:
    """Shape, sample ids and counting tokens of this process's passes, where the first rank has two micro-batches and the other none."""
    layout = global_layout(parallel, world)
    batches = [collate(RandomSamples(4), ids) for ids in ([0, 1], [2, 3])] if world.is_main else []
    passes = same_number_of_passes(batches, layout, world.platform.device)
    return [(tuple(batch.tokens_BS.shape), batch.sample_ids_B.tolist(), float(batch.loss_mask_BS.sum())) for batch in passes]


def test_ranks_that_share_experts_run_the_same_number_of_passes_and_fillings_count_for_nothing(pool: Pool) -> None:
    """What has no shape of its own to take has 128 tokens, which FP8 products of every scaling can be made of."""
    mine = [((2, SEQUENCE), [0, 1], 2.0 * SEQUENCE), ((2, SEQUENCE), [2, 3], 2.0 * SEQUENCE)]
    assert pool.run(fill, EP2, processes=2) == [mine, [((1, 128), [FILLING], 0.0)] * 2]
    assert pool.run(fill, DP2, processes=2) == [mine, []]


def evaluate(world: World, parallel: Parallel, pair: Pair) -> tuple[dict[str, Tensor], list[tuple[float, bool]]]:
    """Window sums and log-likelihoods, with 9 windows in rounds of 4 and 3 batches of requests: two ranks have unlike shares of both."""
    layout = global_layout(parallel, world)
    models = {}
    for name, arch in (("teacher", pair.teacher), ("student", pair.student)):
        models[name] = build_model(arch, layout, world.platform, torch.float32, variable_lengths=True)
        load_model(models[name], pair.folder / name)
    requests = [([1, 2, 3], [4, 5]), ([6], [7]), ([8, 9, 10, 11], [12, 13, 14])]
    with MonkeyPatch.context() as patch:
        patch.setattr(comparison, "WINDOWS_AT_A_TIME", 4)
        patch.setattr(scoring, "BATCH_TOKENS", 1)
        sums = comparison.compare(models, RandomSamples(9), world, what="random tokens")
        return sums, scoring.loglikelihoods(models["student"], requests)


@pytest.mark.parametrize("parallel", [EP2, EP2_PP2], ids=layout_name)
def test_evaluation_agrees_where_ranks_that_share_experts_have_unlike_shares_of_the_work(
    pool: Pool, measured: Record, pairs: dict[str, Pair], parallel: Parallel
) -> None:
    [(sums, scores)] = pool.run(evaluate, ONE, pairs["mixtral"], processes=1)
    for found, answers in pool.run(evaluate, parallel, pairs["mixtral"], processes=parallel.processes):
        differences = [relative_difference(found[name][:, column], sums[name][:, column]) for name in sums for column in (0, 1)]
        assert measured("experts: window sums", layout_name(parallel), max(differences)) <= 1e-5  # fp32: matmuls of other sizes
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in scores]
        assert relative_difference([value for value, _ in answers], [value for value, _ in scores]) <= 1e-5


SOURCE = teacher_of(QWEN3_MOE)
Whole = Callable[..., Run]
TARGET = {"layers": 3, "hidden": 24, "ffn": 16, "heads": 4, "experts": 4}


def expert_recipe(
    runs: Path,
    parallel: Parallel = ONE,
    precision: str = "fp32",
    *,
    micro_batch: int = 1,
    samples: int = CALIBRATION,
    skip: int = 0,
    save_every: int = 512,
    **distill: Any,
) -> Recipe:
    sections = {
        "importance": Importance(
            samples=samples, skip_samples=skip, save_every_samples=save_every, sequence_length=SEQUENCE, micro_batch=micro_batch
        ),
        "prune": Prune(target=Target(**TARGET)),
    }
    return recipe_for(runs, parallel, precision, **distill).model_copy(update=sections)


@pytest.fixture(scope="module")
def sparse_house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`import` and `data` of a model with experts."""
    runs = tmp_path_factory.mktemp("sparse_house")
    build_house(runs, SOURCE)
    return runs


def measure(pool: Pool, house: Path, folder: Path, parallel: Parallel, micro_batch: int = 1, samples: int = CALIBRATION) -> Sums:
    folder.mkdir()
    recipe = expert_recipe(house, parallel, micro_batch=micro_batch, samples=samples)
    pool.run(run_importance, recipe, folder, processes=parallel.processes)
    return Statistics.load(folder / "scores.safetensors").sums


@pytest.fixture(scope="module")
def sums_of_one(pool: Pool, sparse_house: Path, tmp_path_factory: pytest.TempPathFactory) -> Sums:
    return measure(pool, sparse_house, tmp_path_factory.mktemp("importance") / "one", ONE)


@pytest.fixture(scope="module")
def naive(sparse_house: Path, tmp_path_factory: pytest.TempPathFactory) -> Sums:
    train, cache = sparse_house / "tiny" / "data" / "train", tmp_path_factory.mktemp("order")
    samples = packed_samples(train, samples=CALIBRATION, sequence_length=SEQUENCE, seed=1234, cache=cache, repeat=False)
    tokens = torch.stack([samples[sample][:-1] for sample in range(CALIBRATION)])
    return naive_statistics(PlainModel(sparse_house / "tiny" / "import" / "checkpoint", SOURCE), tokens)


def test_experts_and_their_neurons_are_scored_as_a_plain_model_says(sums_of_one: Sums, naive: Sums, measured: Record) -> None:
    axes = {"experts", "expert_ffn", "heads", "head_norms", "head_contributions", "attention_norm", "mlp_norm", "final_norm", "influence"}
    assert {axis for _, axis in sums_of_one} == axes
    assert sums_of_one[0, "expert_ffn"].shape == (3, 2, SOURCE.experts * SOURCE.ffn)
    assert measured("experts: importance against plain fp64", "one", worst(sums_of_one, naive)) <= FP32


@pytest.mark.parametrize(
    ("parallel", "micro_batch"),
    [
        (ONE, 4),
        (EP2, 1),
        (EP2, 4),
        pytest.param(PP2, 1, marks=pytest.mark.slow),
        pytest.param(EP2_PP2, 5, marks=pytest.mark.slow),
        (EP2_OF_DP4, 4),
        (DP2, 1),
        (EP2_PP2_VPP2, 1),
    ],
    ids=name_of,
)
def test_tokens_of_several_samples_and_ranks_in_one_expert_are_each_their_own_samples(
    pool: Pool, sparse_house: Path, sums_of_one: Sums, naive: Sums, tmp_path: Path, measured: Record, parallel: Parallel, micro_batch: int
) -> None:
    """35 samples: ranks have different numbers of micro-batches, one of four has none, and the last micro-batch is smaller."""
    found = measure(pool, sparse_house, tmp_path / "scores", parallel, micro_batch)
    layout = f"{layout_name(parallel)}, {micro_batch}"
    steady, variance = ((part(found, rows), part(sums_of_one, rows)) for rows in ([0, 1], [2]))
    assert measured("experts: importance: mean, l2", layout, worst(*steady)) <= 1e-6  # matmuls of other sizes sum in another order
    assert measured("experts: importance: variance", layout, worst(*variance)) <= FP32  # a small difference of large sums
    assert measured("experts: importance against plain fp64", layout, worst(found, naive)) <= FP32
    if (parallel.expert, micro_batch) == (1, 1):
        assert same_bits(found, sums_of_one)


def assert_close_sums(found: Sums, expected: Sums) -> None:
    """Matmuls of other sizes sum in another order; a variance is a small difference of large sums."""
    assert worst(part(found, [0, 1]), part(expected, [0, 1])) <= 1e-6
    assert worst(part(found, [2]), part(expected, [2])) <= FP32


@pytest.mark.parametrize(("begun", "continued"), [(EP2, ONE), pytest.param(DP2, EP2_PP2, marks=pytest.mark.slow)], ids=name_of)
def test_an_interrupted_pass_continues_with_experts_in_another_layout(
    pool: Pool, sparse_house: Path, sums_of_one: Sums, tmp_path: Path, begun: Parallel, continued: Parallel
) -> None:
    """Of 35 samples 32 are finished, 16 on each data-parallel rank."""
    runs = copy_of(sparse_house, tmp_path / "runs")
    first = pool.run(publish, expert_recipe(runs, begun, save_every=1), 1, processes=2)
    second = pool.run(publish, expert_recipe(runs, continued, save_every=1), processes=continued.processes)
    assert (flat(first), flat(second)) == (list(range(32)), [32, 33, 34])
    assert_close_sums(scores_of(runs).sums, sums_of_one)


def test_passes_with_experts_in_several_layouts_are_merged(pool: Pool, sparse_house: Path, sums_of_one: Sums, tmp_path: Path) -> None:
    files = []
    for parallel, samples in ((EP2, range(16)), (ONE, range(16, CALIBRATION))):
        files.append(tmp_path / layout_name(parallel))
        files[-1].mkdir()
        recipe = expert_recipe(sparse_house, parallel, samples=len(samples), skip=samples.start)
        pool.run(run_importance, recipe, files[-1], processes=parallel.processes)
    merged = merge_files(files, tmp_path / "merged")
    assert merged.samples == CALIBRATION
    assert_close_sums(merged.sums, sums_of_one)


@pytest.fixture(scope="module")
def pruned_house(pool: Pool, sparse_house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with importance, measured with experts on two ranks, and prune."""
    runs = copy_of(sparse_house, tmp_path_factory.mktemp("pruned_house") / "runs")
    pool.run(publish_stage, "importance", expert_recipe(runs, EP2), processes=2)
    pool.run(publish_stage, "prune", expert_recipe(runs), processes=1)
    return runs


@pytest.fixture(scope="module")
def whole(pool: Pool, pruned_house: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """whole(layout, precision): the uninterrupted distillation, made once."""
    made: dict[tuple[str, str], Run] = {}

    def run(parallel: Parallel, precision: str = "fp32") -> Run:
        key = layout_name(parallel), precision
        if key not in made:
            runs = copy_of(pruned_house, tmp_path_factory.mktemp("whole") / "runs")
            pool.run(publish_stage, "distill", expert_recipe(runs, parallel, precision), processes=parallel.processes)
            made[key] = Run(runs / "tiny" / "distill", [])
        return made[key]

    return run


def digest(run: Run) -> str:
    return weights_digest(MegatronSource(run.path / "checkpoint", SOURCE.resized(**TARGET)))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [EP2, EP2_PP2], ids=layout_name)
def test_losses_and_gradient_norms_of_twenty_steps_agree_with_one_process(whole: Whole, measured: Record, parallel: Parallel) -> None:
    """5 validation windows: ranks that share experts have different numbers of them."""
    one, found = whole(ONE), whole(parallel)
    assert len(one.steps("loss")) == STEPS
    assert one.steps("loss")[-1] < 0.9 * one.steps("loss")[0]  # it learns
    for name in ("loss", "gradient_norm", "learning_rate"):
        difference = max(relative_difference(a, b) for a, b in zip(found.steps(name), one.steps(name), strict=True))
        # later steps drift by what Adam makes of rounding; another sample would be 1e-1
        assert measured(f"experts: 20 steps: {name}", layout_name(parallel), difference) <= 1e-4
    last = [run.records()[-1]["validation"]["forward_kl"] for run in (found, one)]
    assert measured("experts: 20 steps: validation", layout_name(parallel), relative_difference(*last)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_with_experts_on_two_ranks_reproduces_the_whole_one_to_the_bit(
    pool: Pool, pruned_house: Path, whole: Whole, tmp_path: Path, precision: str
) -> None:
    recipe = expert_recipe(copy_of(pruned_house, tmp_path / "runs"), EP2, precision)
    for step in (JUST_SAVED, UNSAVED_STEPS):
        pool.run(distill_until, recipe, step, processes=2)
    pool.run(publish_stage, "distill", recipe, processes=2)
    continued, expected = Run(tmp_path / "runs" / "tiny" / "distill", []), whole(EP2, precision)
    assert continued.bits() == expected.bits()
    assert digest(continued) == digest(expected)


@pytest.mark.slow
def test_bf16_with_experts_on_two_ranks_is_close_to_one_process(whole: Whole, measured: Record) -> None:
    found, one = whole(EP2, "bf16").steps("loss"), whole(ONE, "bf16").steps("loss")
    difference = max(relative_difference(a, b) for a, b in zip(found, one, strict=True))
    assert measured("experts: 20 steps: loss, bf16", "dp2_ep2", difference) <= 1e-2  # 8 bits of mantissa, other orders of additions
