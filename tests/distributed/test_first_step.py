"""Loss and gradients of the first distillation step: every layout against a plain fp64 computation, and against one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from minitron_megatron.config.distill import Training
from minitron_megatron.config.parallel import Parallel, TeacherParallel
from minitron_megatron.data.batches import of_data_rank
from minitron_megatron.model.run import forward_only
from minitron_megatron.parallel.split import hidden_state_work, split_layers
from minitron_megatron.parallel.world import World

from .conftest import Record
from .first_step import GLOBAL_BATCH, FirstStep, Pair, first_step, load_batch, load_pair, plain_first_step, run_first_step, settings, step_groups
from .pool import Pool
from .tiny import (
    DP2,
    LLAMA,
    NEMOTRON,
    NEMOTRON_TIED,
    ONE,
    PP2,
    PP2_EVEN,
    PP2_VPP2,
    PP4_LISTED,
    QWEN2_TIED,
    QWEN3,
    SEQUENCE,
    TP2,
    TP2_PP2,
    TP2_SP,
    UNEVEN,
    WIDE,
    layout_name,
    name_of,
    relative_difference,
    with_teacher,
    worst_difference,
)

STUDENTS = {
    "llama": LLAMA,
    "qwen2_tied": QWEN2_TIED,
    "qwen3": QWEN3,
    "wide": WIDE,
    "uneven": UNEVEN,
    "nemotron": NEMOTRON,
    "nemotron_tied": NEMOTRON_TIED,
}
LAYOUTS = [("llama", layout) for layout in (TP2, TP2_SP, PP2, DP2, TP2_PP2, PP2_VPP2, PP4_LISTED)]
LAYOUTS += [("qwen2_tied", layout) for layout in (TP2, TP2_SP, PP2_EVEN, DP2, TP2_PP2, PP2_VPP2)] + [("qwen3", TP2_SP)]
LAYOUTS += [("uneven", layout) for layout in (TP2_SP, PP2, PP2_VPP2)]
LAYOUTS += [("nemotron", layout) for layout in (TP2_SP, PP2)] + [("nemotron_tied", TP2_PP2)]
TEACHER_TP2, TEACHER_TP2_SP, TEACHER_PP2 = TeacherParallel(tensor=2), TeacherParallel(tensor=2, sequence=True), TeacherParallel(pipeline=2)
MIXED = [
    ("llama", with_teacher(PP2, TEACHER_TP2)),
    ("qwen2_tied", with_teacher(TP2_SP, TEACHER_PP2)),
    ("qwen2_tied", with_teacher(DP2, TEACHER_TP2_SP)),
    ("wide", with_teacher(TP2_PP2, TeacherParallel(tensor=4))),
    ("llama", with_teacher(Parallel(pipeline=2, data=2), TEACHER_TP2_SP)),
    ("llama", with_teacher(Parallel(tensor=2, data=2), TeacherParallel(pipeline=4, layers_per_stage=[1, 3, 1, 1]))),
    ("qwen2_tied", with_teacher(PP2_VPP2, TeacherParallel())),
    ("wide", with_teacher(Parallel(tensor=4, sequence=True), TeacherParallel(tensor=2, pipeline=2))),
    ("llama", with_teacher(PP2, TeacherParallel())),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {name: Pair(arch, tmp_path_factory.mktemp(name)).written() for name, arch in STUDENTS.items()}


@pytest.fixture(scope="module")
def expected(pairs: dict[str, Pair]) -> dict[str, FirstStep]:
    return {name: plain_first_step(pair, settings()) for name, pair in pairs.items()}


@pytest.fixture(scope="module")
def one_process(pool: Pool, pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> dict[str, FirstStep]:
    folder = tmp_path_factory.mktemp("one_process")
    return {name: run_first_step(pool, ONE, pairs[name], settings(), folder / name) for name in STUDENTS}


def check(found: FirstStep, reference: FirstStep, record: Record, layout: str, claim: str) -> None:
    gradient, name = worst_difference(found.gradients, reference.gradients)
    loss = max(relative_difference(found.kl, reference.kl), relative_difference(found.cross_entropy, reference.cross_entropy))
    assert found.tokens == reference.tokens
    assert record(f"{claim}: loss", layout, loss) <= 1e-6  # fp32 sums in another order (design: numbers that must not move)
    assert record(f"{claim}: gradients", layout, gradient) <= 1e-5, name
    assert record(f"{claim}: gradient norm", layout, relative_difference(found.gradient_norm, reference.gradient_norm)) <= 1e-6


@pytest.mark.parametrize(("shape", "parallel"), LAYOUTS + MIXED, ids=name_of)
def test_loss_and_every_gradient_of_the_first_step_equal_a_plain_computation_and_one_process(
    pool: Pool,
    measured: Record,
    pairs: dict[str, Pair],
    expected: dict[str, FirstStep],
    one_process: dict[str, FirstStep],
    tmp_path: Path,
    shape: str,
    parallel: Parallel,
) -> None:
    found = run_first_step(pool, parallel, pairs[shape], settings(), tmp_path / "gradients")
    check(found, expected[shape], measured, layout_name(parallel), "first step, plain fp64")
    check(found, one_process[shape], measured, layout_name(parallel), "first step, one process")


@pytest.mark.parametrize("shape", ["llama", "qwen2_tied"])
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_data_parallel_machinery_changes_neither_loss_nor_gradients(
    pool: Pool, measured: Record, pairs: dict[str, Pair], expected: dict[str, FirstStep], tmp_path: Path, shape: str, distributed_optimizer: bool
) -> None:
    """Two micro-batches a rank; gradients are reduced, or scattered, while backward runs, and weights gathered while forward does."""
    machinery = Training(distributed_optimizer=distributed_optimizer, overlap_grad_reduce=True, overlap_param_gather=distributed_optimizer)
    parallel = Parallel(tensor=2, data=2, sequence=shape == "llama")
    found = run_first_step(pool, parallel, pairs[shape], settings(), tmp_path / "gradients", partial(first_step, training=machinery))
    name = f"{layout_name(parallel)}, {'distributed' if distributed_optimizer else 'plain'} optimizer, overlaps"
    check(found, expected[shape], measured, name, "first step, plain fp64")


@pytest.mark.parametrize("parallel", [TP2_SP, PP2, DP2], ids=layout_name)
def test_temperature_and_cross_entropy_in_the_mix_equal_a_plain_computation(
    pool: Pool, measured: Record, pairs: dict[str, Pair], tmp_path: Path, parallel: Parallel
) -> None:
    mixed = settings(loss={"forward_kl": 0.7, "cross_entropy": 0.4}, temperature=2.5)
    found = run_first_step(pool, parallel, pairs["llama"], mixed, tmp_path / "gradients")
    check(found, plain_first_step(pairs["llama"], mixed), measured, layout_name(parallel), "T=2.5, mixed, plain fp64")


@pytest.mark.parametrize("micro_batch", [1, 4, 8])
def test_the_size_of_a_micro_batch_changes_neither_loss_nor_gradients(
    pool: Pool, measured: Record, pairs: dict[str, Pair], expected: dict[str, FirstStep], tmp_path: Path, micro_batch: int
) -> None:
    """Samples weigh differently many tokens: a mean per micro-batch would move the loss by percents."""
    found = run_first_step(pool, ONE, pairs["qwen2_tied"], settings(micro_batch=micro_batch), tmp_path / "gradients")
    check(found, expected["qwen2_tied"], measured, f"micro-batch {micro_batch}", "first step, plain fp64")


def test_both_stages_of_a_tied_embedding_hold_the_whole_gradient(
    pool: Pool, pairs: dict[str, Pair], expected: dict[str, FirstStep], tmp_path: Path
) -> None:
    """The first stage knows the look-up's part, the last one the output's: finalize adds them on both."""
    pair = pairs["qwen2_tied"]
    first, last = (answer.vocabulary for answer in pool.run(first_step, PP2_EVEN, pair, settings(), tmp_path / "gradients", processes=2))
    assert torch.equal(first, last)
    # fp32 against fp64
    assert relative_difference(first, expected["qwen2_tied"].gradients["embedding.word_embeddings.weight"]) <= 1e-5


def loss_without_gradients(world: World, pair: Pair) -> tuple[float, bool]:
    """The summed KL of a forward-only pass, and whether the output layer made a buffer for the weight's gradient."""
    teacher, student = load_pair(world, ONE, pair, settings())
    groups = step_groups(settings())
    states, batches = teacher.states(groups, load_batch), [load_batch(ids) for ids in of_data_rank(groups, 0, 1)]
    logged = forward_only(student.model, batches, consume=lambda hidden, batch: student.loss(states, hidden, batch)[2])
    return sum(float(item["forward_kl"]) for item in logged), student.model.last.output_layer.gradient_buffer._buffer is not None


def test_validation_has_the_same_loss_and_computes_no_gradient(pool: Pool, pairs: dict[str, Pair], expected: dict[str, FirstStep]) -> None:
    """A gradient here would cost as much as training, and would keep the buffer that training uses again."""
    [(kl, made_a_buffer)] = pool.run(loss_without_gradients, pairs["llama"], processes=1)
    reference = expected["llama"]
    assert relative_difference(kl / reference.tokens, reference.kl) <= 1e-6  # fp32 against fp64
    assert not made_a_buffer


def test_a_hand_over_moves_each_state_exactly_once_and_nothing_in_one_layout(pool: Pool, pairs: dict[str, Pair], tmp_path: Path) -> None:
    """Counted in bytes of [S, B, D] fp32 states, kept ones too; what lies on the right rank is not sent."""
    whole = GLOBAL_BATCH * SEQUENCE * pairs["llama"].teacher.hidden * 4
    expected_sent = {
        TP2_SP: 0,
        PP2: 0,  # the teacher's auto layout has no pipeline: DP2, and half of the micro-batches are made on the other rank
        with_teacher(PP2, "student"): 0,
        with_teacher(PP2, TEACHER_TP2): 0,  # both ranks hold whole states, the last stage is one of them
        with_teacher(DP2, TEACHER_TP2_SP): whole // 2,  # each rank needs its samples' other half of the sequence
        with_teacher(TP2, TEACHER_PP2): whole // 2,  # the first tensor rank's half of every state
    }
    expected_sent[PP2] = whole // 2
    for number, (parallel, sent) in enumerate(expected_sent.items()):
        answers = run_first_step(pool, parallel, pairs["llama"], settings(), tmp_path / str(number)).answers
        assert sum(answer.bytes_sent for answer in answers) == sent, parallel
        assert sum(answer.bytes_sent + answer.bytes_kept for answer in answers) == whole, parallel


@pytest.mark.parametrize(
    "parallel",
    [PP2, TP2_SP, with_teacher(PP2, "student"), *(pytest.param(mixed, marks=pytest.mark.slow) for _, mixed in MIXED)],
    ids=name_of,
)
def test_each_rank_holds_its_shard_of_the_teacher_and_one_output_weight_on_the_students_last_stage(
    pool: Pool, pairs: dict[str, Pair], tmp_path: Path, parallel: Parallel
) -> None:
    """By hand: matrices are cut over tensor ranks, norms are whole, the vocabulary is padded; stages are the slowest part of a rank."""
    pair = pairs["wide" if parallel.tensor == 4 or getattr(parallel.teacher, "tensor", 0) == 4 else "llama"]
    arch, own = pair.teacher, teacher_sizes(parallel)
    split = split_layers(arch.layers, own.pipeline, own.layers_per_stage, hidden_state_work(arch))
    attention = (2 * arch.heads + 2 * arch.kv_groups) * arch.head_channels * arch.hidden
    layer = (attention + 3 * arch.ffn * arch.hidden) // own.tensor + 2 * arch.hidden
    answers = run_first_step(pool, parallel, pair, settings(), tmp_path / "gradients").answers
    for rank, answer in enumerate(answers):
        stage = rank // (parallel.processes // own.pipeline)
        embedding = -(-arch.vocab // own.tensor) * arch.hidden if stage == 0 else 0
        norm = arch.hidden if stage == own.pipeline - 1 else 0
        assert answer.teacher_parameters == split[stage] * layer + embedding + norm
        is_last = rank // (parallel.processes // parallel.pipeline) == parallel.pipeline - 1
        assert answer.teacher_output == (-(-arch.vocab // parallel.tensor) * arch.hidden if is_last else 0)


def teacher_sizes(parallel: Parallel) -> TeacherParallel:
    if isinstance(parallel.teacher, TeacherParallel):
        return parallel.teacher
    pipeline = parallel.pipeline if parallel.teacher == "student" else 1  # a tiny model fits everywhere
    return TeacherParallel(tensor=parallel.tensor, pipeline=pipeline, sequence=parallel.sequence)
