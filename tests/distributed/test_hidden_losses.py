"""Hidden-state and embedding losses in the first step: any pair of layouts against a plain fp64 computation, and what their machinery keeps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from fused_layers import fused_layers
from megatron.core import dist_checkpointing, tensor_parallel
from torch import Tensor

from minitron_megatron.checkpoint.sharded import load_model, model_state, save_state
from minitron_megatron.config.distill import Distill, HiddenLoss, LearningRate, Training
from minitron_megatron.config.parallel import Parallel, TeacherParallel
from minitron_megatron.data.batches import collate, of_data_rank
from minitron_megatron.distill.hidden.map import StateName
from minitron_megatron.distill.hidden.projection import without_projections
from minitron_megatron.distill.hidden.states import StateCapture
from minitron_megatron.model.build import build_model
from minitron_megatron.model.run import forward_only
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.split import distillation_work, split_layers
from minitron_megatron.parallel.world import World
from minitron_megatron.training import optimizer
from minitron_megatron.training.student import Student
from minitron_megatron.training.training_checkpoint import Progress, TrainingCheckpoints

from .conftest import Record
from .first_step import (
    GLOBAL_BATCH,
    Answer,
    FirstStep,
    Pair,
    accumulate,
    first_step,
    initial_projection,
    load_batch,
    load_pair,
    plain_first_step,
    plain_terms,
    projections_of,
    run_first_step,
    settings,
    step_groups,
)
from .plain_model import PlainModel
from .pool import Pool
from .tiny import (
    DP2,
    EP2_PP2,
    LLAMA,
    MIXTRAL,
    ONE,
    PP2,
    PP2_VPP2,
    SEQUENCE,
    TP2,
    TP2_PP2,
    TP2_SP,
    WIDE,
    RandomSamples,
    layout_name,
    relative_difference,
    with_teacher,
    worst_difference,
)

ALPHA, RATE = 0.37, 1e-3
SPARSE = MIXTRAL.resized(layers=5)
# student layers 1, 3 and 4 of 5 and the embedding: on both of two stages and on all of four; the teacher's layer 2 serves two of them
PAIRS = [(2, 1), (2, 3), (5, 4)]
DP2_PP2, DP2_PP2_VPP2 = Parallel(pipeline=2, data=2), Parallel(pipeline=2, virtual=2, data=2)


class Case(NamedTuple):
    """What one run compares, and how the machinery runs it."""

    parallel: Parallel
    distill: Distill
    shape: str = "llama"
    recompute: str | None = None
    """None, "full" or "norm"."""
    distributed_optimizer: bool = False
    fused: bool = False
    """Norms inside the linear layers behind them, as Transformer Engine keeps them."""


def distill_of(**hidden: Any) -> Distill:
    rate = LearningRate(peak=RATE, minimum=RATE, warmup_steps=0)
    return settings(hidden=HiddenLoss(**{"pairs": PAIRS, "embeddings": True, "weight": ALPHA, **hidden}), learning_rate=rate)


COSINE, MSE_PER_PAIR = distill_of(), distill_of(kind="mse", projection="per_pair")
MSE, PER_PAIR = distill_of(kind="mse"), distill_of(projection="per_pair")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """A projection larger than the weight that lies next to it in the first stage's gradients: there a shard's cut would go through it."""
    return {
        name: Pair(arch, tmp_path_factory.mktemp(name), teacher_hidden=48).written()
        for name, arch in (("llama", LLAMA), ("wide", WIDE), ("sparse", SPARSE))
    }


Expected = Callable[[Case], FirstStep]


@pytest.fixture(scope="module")
def expected(pairs: dict[str, Pair]) -> Expected:
    made: dict[str, FirstStep] = {}

    def plain(case: Case) -> FirstStep:
        key = f"{case.shape} {case.distill.hidden}"
        if key not in made:
            made[key] = plain_first_step(pairs[case.shape], case.distill)
        return made[key]

    return plain


# --- how the machinery runs -------------------------------------------------------------------------------------------------------------


def set_recompute(student: Student, recompute: str | None) -> None:
    config = student.model.config
    if recompute == "full":
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    for layer in student.model.layers() if recompute == "norm" else ():
        layer.recompute_input_layernorm = True


def without_fp8() -> Any:
    """By default this class of megatron-core asks Transformer Engine about fp8, which CPUs lack."""
    return mock.patch.object(tensor_parallel, "CheckpointWithoutOutput", partial(tensor_parallel.CheckpointWithoutOutput, fp8=None))


OVERLAPPED = Training(overlap_grad_reduce=True, overlap_param_gather=True)


def small_buckets() -> Any:
    """So that a shard's cut would go through a projection that had no bucket of its own."""
    return mock.patch.object(optimizer, "DistributedDataParallelConfig", partial(optimizer.DistributedDataParallelConfig, bucket_size=1500))


def first_step_of(case: Case, world: World, parallel: Parallel, pair: Pair, distill: Distill, written: Path) -> Answer:
    training = OVERLAPPED if case.distributed_optimizer else Training()
    spec = fused_layers() if case.fused else nullcontext()
    with spec, small_buckets() if case.distributed_optimizer else nullcontext(), without_fp8():
        return first_step(world, parallel, pair, distill, written, training, lambda student: set_recompute(student, case.recompute))


# --- loss and gradients -----------------------------------------------------------------------------------------------------------------

CASES = {
    "one": Case(ONE, COSINE),
    "tp2_sp_mse_per_pair": Case(TP2_SP, MSE_PER_PAIR),
    "tp2-teacher_tp2_sp": Case(with_teacher(TP2, TeacherParallel(tensor=2, sequence=True)), COSINE),
    "tp2_sp-teacher_tp2": Case(with_teacher(TP2_SP, TeacherParallel(tensor=2)), MSE),
    "pp2": Case(PP2, COSINE),
    "pp2_vpp2": Case(PP2_VPP2, COSINE),
    "tp2_pp2_sp": Case(TP2_PP2, COSINE),
    "dp2_mse": Case(DP2, MSE),
    "pp2-teacher_tp2": Case(with_teacher(PP2, TeacherParallel(tensor=2)), MSE_PER_PAIR),
    "tp2_sp-teacher_pp2": Case(with_teacher(TP2_SP, TeacherParallel(pipeline=2)), COSINE),
    "wide_tp2_pp2_sp-teacher_tp4": Case(with_teacher(TP2_PP2, TeacherParallel(tensor=4)), COSINE, shape="wide"),
    "pp2_full_recompute": Case(PP2, COSINE, recompute="full"),
    "pp2_dp2_distributed_optimizer": Case(DP2_PP2, COSINE, distributed_optimizer=True),
    "experts_pp2_dp2_ep2": Case(EP2_PP2, COSINE, shape="sparse"),
    "fused_tp2_sp_full_recompute": Case(TP2_SP, COSINE, recompute="full", fused=True),
    "fused_pp2_dp2_distributed_optimizer": Case(DP2_PP2, COSINE, distributed_optimizer=True, fused=True),
}
SLOW_CASES = {
    "one_mse_per_pair": Case(ONE, MSE_PER_PAIR),
    "tp2": Case(TP2, COSINE),
    "tp2_mse_per_pair": Case(TP2, MSE_PER_PAIR),
    "tp2_sp": Case(TP2_SP, COSINE),
    "pp2_mse": Case(PP2, MSE),
    "pp2-teacher_student": Case(with_teacher(PP2, "student"), PER_PAIR),
    "pp2_vpp2_mse_per_pair": Case(PP2_VPP2, MSE_PER_PAIR),
    "pp2_vpp2-teacher_student": Case(with_teacher(PP2_VPP2, "student"), MSE),
    "pp2_vpp2_full_recompute": Case(PP2_VPP2, COSINE, recompute="full"),
    "tp2_pp2_sp_per_pair_norm_recompute": Case(TP2_PP2, PER_PAIR, recompute="norm"),
    "tp2_sp-teacher_pp2_mse_per_pair": Case(with_teacher(TP2_SP, TeacherParallel(pipeline=2)), MSE_PER_PAIR),
    "wide_tp4_sp-teacher_tp2_pp2": Case(with_teacher(Parallel(tensor=4, sequence=True), TeacherParallel(tensor=2, pipeline=2)), MSE, shape="wide"),
    "dp2": Case(DP2, COSINE),
    "fused_pp2_vpp2_mse_per_pair": Case(PP2_VPP2, MSE_PER_PAIR, fused=True),
    "dp2_distributed_optimizer": Case(DP2, COSINE, distributed_optimizer=True),
    "pp2_vpp2_dp2_distributed_optimizer": Case(DP2_PP2_VPP2, COSINE, distributed_optimizer=True),
}


def check(found: FirstStep, reference: FirstStep, record: Record, layout: str) -> None:
    gradient, name = worst_difference(found.gradients, reference.gradients)
    of_projection, projection = worst_difference(found.projections, reference.projections)
    losses = max(relative_difference(found.kl, reference.kl), relative_difference(found.hidden, reference.hidden))
    assert found.tokens == reference.tokens
    assert record("hidden losses, plain fp64: losses", layout, losses) <= 1e-6  # fp32 sums in another order
    assert record("hidden losses, plain fp64: gradients", layout, gradient) <= 1e-5, name
    assert record("hidden losses, plain fp64: projection", layout, of_projection) <= 1e-5, projection
    assert record("hidden losses, plain fp64: norm", layout, relative_difference(found.gradient_norm, reference.gradient_norm)) <= 1e-6


def wanted_states(case: Case, pair: Pair) -> int:
    """By hand: how many states of a sample travel; the final one, and each of the teacher's once for every stage that compares it."""
    ranks, ends = case.parallel.pipeline, distillation_work(pair.student, pair.teacher)
    split = split_layers(pair.student.layers, ranks * case.parallel.virtual, "cost", ends, ranks=ranks)
    stage_of_layer = [stage for stage, layers in enumerate(split) for _ in range(layers)]
    return len({(teacher, stage_of_layer[student]) for teacher, student in PAIRS}) + len(["embedding", "final"])


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)])
def test_hidden_losses_and_every_gradient_equal_a_plain_computation_and_each_state_travels_once(
    pool: Pool, measured: Record, pairs: dict[str, Pair], expected: Expected, tmp_path: Path, name: str
) -> None:
    case = (CASES | SLOW_CASES)[name]
    pair = pairs[case.shape]
    found = run_first_step(pool, case.parallel, pair, case.distill, tmp_path / "gradients", partial(first_step_of, case))
    check(found, expected(case), measured, name)
    for answer in found.answers:  # every copy of a projection steps by the same gradient, or the copies would part
        for projection, gradient in answer.projections:
            assert torch.equal(gradient, found.projections[projection])
    whole = GLOBAL_BATCH * SEQUENCE * pair.teacher.hidden * 4
    assert sum(answer.bytes_sent + answer.bytes_kept for answer in found.answers) == wanted_states(case, pair) * whole


def test_only_states_that_are_made_elsewhere_are_sent(pool: Pool, pairs: dict[str, Pair], tmp_path: Path) -> None:
    """Bytes of [S, B, E] fp32 states, by hand; the student's first two stages of four are layers 0 and 1, 2, of two: 0, 1, 2."""
    whole = GLOBAL_BATCH * SEQUENCE * pairs["llama"].teacher.hidden * 4
    expected_sent = {
        PP2: 2.5,  # the teacher's auto layout is DP2: half of all micro-batches of five states were made on the other rank
        PP2_VPP2: 2.5,  # the same states, on one virtual stage each
        with_teacher(PP2, "student"): 1.0,  # teacher 3 + 3 layers: layer 2 for the student's layer 3 alone arises on the other stage
        with_teacher(PP2, TeacherParallel(tensor=2)): 0.0,  # whole states on both ranks
    }
    for number, (parallel, states) in enumerate(expected_sent.items()):
        answers = run_first_step(pool, parallel, pairs["llama"], COSINE, tmp_path / str(number)).answers
        assert sum(answer.bytes_sent for answer in answers) == states * whole, parallel


# --- several steps, measuring, checkpoints ----------------------------------------------------------------------------------------------


def copies_after_two_steps(world: World, parallel: Parallel, pair: Pair) -> tuple[list[Tensor], bool]:
    """This process's copies of the shared projection after two steps with every overlap, and whether nothing is left in the norms' queues."""
    with small_buckets():
        teacher, student = load_pair(world, parallel, pair, COSINE, OVERLAPPED)
    for _ in range(2):
        student.optimizer.zero_grad()
        accumulate(teacher, student, COSINE)
        student.optimizer.step()
    for chunk in student.wrapped:
        chunk.start_param_sync(force_sync=True)
    return [weight.detach().clone() for _, weight in projections_of(student)], is_empty(student)


def is_empty(student: Student) -> bool:
    assert student.hidden is not None
    return not any(queue for losses in student.hidden.losses for queue in losses._queues.values())


@pytest.mark.parametrize("parallel", [DP2_PP2, pytest.param(DP2_PP2_VPP2, marks=pytest.mark.slow)], ids=layout_name)
def test_copies_of_a_shared_projection_stay_equal_to_the_bit_over_stages_and_data_ranks(
    pool: Pool, pairs: dict[str, Pair], parallel: Parallel
) -> None:
    """Each data-parallel rank steps its shard and gathers the others': other shards on another stage, and the copies part."""
    answers = pool.run(copies_after_two_steps, parallel, pairs["llama"], processes=4)
    copies = [copy for found, _ in answers for copy in found]
    assert all(1 <= len(found) <= parallel.virtual for found, _ in answers)  # one for each chunk that compares a layer
    assert len(copies) > 4 or parallel.virtual == 1
    # Adam's first steps move every weight that has a gradient by about the learning rate
    start = initial_projection(pairs["llama"], plain_terms(COSINE.hidden)[0])
    assert RATE < (copies[0] - start).abs().median() < 3 * RATE
    assert all(torch.equal(copies[0], copy) for copy in copies)
    assert all(empty for _, empty in answers)


def measure(world: World, parallel: Parallel, pair: Pair) -> tuple[Tensor, bool]:
    """The losses of a forward-only pass by a student that recomputes, and whether nothing is left behind by one without hidden losses."""
    teacher, student = load_pair(world, parallel, pair, COSINE)
    set_recompute(student, "full")
    hidden, groups, layout = student.hidden, step_groups(COSINE), student.model.layout
    assert hidden is not None
    batches = [load_batch(ids) for ids in of_data_rank(groups, layout.data_rank, layout.data)]
    with hidden.measuring():
        forward_only(student.model, batches, before=partial(hidden.expect, teacher.states(groups, load_batch, hidden.wanted)))
    sums = hidden.take_sums()
    forward_only(student.model, batches)  # a validation
    return sums, is_empty(student) and not hidden.take_sums().any()


@pytest.mark.parametrize(
    "parallel", [PP2_VPP2, pytest.param(ONE, marks=pytest.mark.slow), pytest.param(TP2_PP2, marks=pytest.mark.slow)], ids=layout_name
)
def test_a_forward_only_pass_measures_the_same_losses_and_a_validation_leaves_nothing(
    pool: Pool, pairs: dict[str, Pair], expected: Expected, parallel: Parallel
) -> None:
    answers = pool.run(measure, parallel, pairs["llama"], processes=parallel.processes)
    reference = expected(Case(ONE, COSINE))
    sums = sum(sums for sums, _ in answers)
    assert relative_difference(sums / reference.tokens, reference.hidden) <= 1e-6  # fp32 against fp64
    assert all(empty for _, empty in answers)


def capture(world: World, parallel: Parallel, pair: Pair) -> dict[StateName, Tensor]:
    """Two micro-batches through a megatron teacher; the states of the second one that arise here, [S, B, E]."""
    teacher = build_model(pair.teacher, global_layout(parallel, world), world.platform, torch.float32, output_layer=None)
    load_model(teacher, pair.folder / "teacher")
    captured = StateCapture(teacher.chunks, [("layer", 0), ("layer", 5), ("embedding",)])
    tokens = RandomSamples(GLOBAL_BATCH)
    found = []
    for ids in ([0, 1], [2, 3]):
        forward_only(teacher, [collate(tokens, ids)])
        found.append(captured.take())
    captured.remove()
    forward_only(teacher, [collate(tokens, [0, 1])])
    assert not captured.take()
    return found[1]


@pytest.mark.parametrize("parallel", [pytest.param(ONE, marks=pytest.mark.slow), TP2_PP2], ids=layout_name)
def test_captured_states_are_those_of_a_plain_model_on_the_stage_where_they_arise(pool: Pool, pairs: dict[str, Pair], parallel: Parallel) -> None:
    pair = pairs["llama"]
    plain = PlainModel(pair.folder / "teacher", pair.teacher)
    plain.hidden(RandomSamples(GLOBAL_BATCH).tokens[2:4, :-1])
    answers = pool.run(capture, parallel, pair, processes=parallel.processes)
    for name in (("layer", 0), ("layer", 5), ("embedding",)):
        parts = [answer[name] for answer in answers if name in answer]
        assert len(parts) == parallel.tensor  # on one stage, a part of S from each tensor rank
        assert relative_difference(torch.cat(parts), plain.states[name].detach().transpose(0, 1)) <= 1e-5  # one element, after five layers in fp32


def write(state: dict[str, Any], folder: Path, world: World) -> None:
    if world.is_main:
        folder.mkdir()
    world.barrier()
    save_state(state, folder)


def checkpoints_in(folder: Path, world: World) -> TrainingCheckpoints:
    return TrainingCheckpoints(folder / "training", world, keep=1, asynchronous=False)


def train_and_save(world: World, parallel: Parallel, pair: Pair, written: Path) -> Tensor:
    """Weights and optimizer after a step, as the training checkpoint has them, and what would be published; returns the projection."""
    teacher, student = load_pair(world, parallel, pair, COSINE)
    accumulate(teacher, student, COSINE)
    student.optimizer.step()
    checkpoints_in(written, world).save(Progress(step=1), student)
    published = {name: without_projections(chunk) for name, chunk in model_state(student.model).items()}
    write(published, written / "published", world)
    return projections_of(student)[0][1].detach().clone()


def load_training_state(world: World, parallel: Parallel, pair: Pair, written: Path) -> list[tuple[Tensor, Tensor]]:
    """Each copy of the projection and Adam's first moment of it."""
    _, student = load_pair(world, parallel, pair, COSINE)
    checkpoints_in(written, world).load(student)
    [adam] = getattr(student.optimizer, "chained_optimizers", [student.optimizer])
    return [(weight.detach().clone(), adam.optimizer.state[weight]["exp_avg"].clone()) for _, weight in projections_of(student)]


def test_a_checkpoint_holds_the_shared_projection_once_for_every_layout_and_what_is_published_lacks_it(
    pool: Pool, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    saved = pool.run(train_and_save, TP2_PP2, pairs["llama"], tmp_path, processes=4)
    training, published = (set(dist_checkpointing.load_tensors_metadata(str(tmp_path / name))) for name in ("training/step_00000001", "published"))
    weights = {key for key in training if not key.startswith("optimizer.")}
    assert weights - published == {"distillation_projections.shared.weight"}
    moments = []
    for parallel in (ONE, PP2, PP2_VPP2):
        for copies in pool.run(load_training_state, parallel, pairs["llama"], tmp_path, processes=parallel.processes):
            assert 1 <= len(copies) <= parallel.virtual  # one for each chunk that compares a layer
            assert all(torch.equal(weight, saved[0]) for weight, _ in copies)
            moments += [moment for _, moment in copies]
    assert moments[0].abs().max() > 0 and all(torch.equal(moments[0], other) for other in moments)
