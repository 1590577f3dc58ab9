"""Loss and gradients of the first distillation step: every layout against a plain fp64 computation, and against one process."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import load_model, model_state, save_state
from minitron_megatron.config.schema import Distill, Parallel
from minitron_megatron.data.batches import Batch, collate, step_sample_ids
from minitron_megatron.distill.output_layer import DistillationOutputLayer
from minitron_megatron.distill.student import Student, make_student
from minitron_megatron.distill.teacher import TeacherStates
from minitron_megatron.model.gpt import HiddenStateGPT, build_model
from minitron_megatron.model.run import forward_backward, forward_only
from minitron_megatron.parallel.layout import Layout, global_layout
from minitron_megatron.parallel.world import World

from .conftest import Record
from .plain_model import PlainModel, cross_entropy, kd_loss
from .pool import Pool
from .tiny import (
    DP2,
    LLAMA,
    ONE,
    PP2,
    PP2_EVEN,
    QWEN2_TIED,
    QWEN3,
    TP2,
    TP2_PP2,
    TP2_SP,
    RandomSamples,
    layout_name,
    name_of,
    read_all,
    relative_difference,
    teacher_of,
    worst_difference,
    write_random,
)

GLOBAL_BATCH, MICRO_BATCH = 8, 2
STUDENTS = {"llama": LLAMA, "qwen2_tied": QWEN2_TIED, "qwen3": QWEN3}
LAYOUTS = [("llama", layout) for layout in (TP2, TP2_SP, PP2, DP2, TP2_PP2)]
LAYOUTS += [("qwen2_tied", layout) for layout in (TP2, TP2_SP, PP2_EVEN, DP2, TP2_PP2)] + [("qwen3", TP2_SP)]


@dataclass(frozen=True)
class Pair:
    """Teacher and student on disk."""

    student: Architecture
    folder: Path

    @property
    def teacher(self) -> Architecture:
        return teacher_of(self.student)


@dataclass(frozen=True)
class FirstStep:
    """Means over all tokens that count, the norm that the optimizer sees, and where the gradients were written."""

    kl: float
    cross_entropy: float
    tokens: int
    gradient_norm: float
    gradients: dict[str, Tensor]


def settings(**changes: object) -> Distill:
    return Distill(
        **{"steps": 10, "sequence_length": 16, "global_batch": GLOBAL_BATCH, "micro_batch": MICRO_BATCH, "loss_chunk_tokens": 7, **changes}
    )


def token_weights() -> Tensor:
    """[samples, S] zeros and ones, another number of ones in each sample, so that a mean of means would show."""
    generator = torch.Generator().manual_seed(5)
    return torch.stack([(torch.rand(16, generator=generator) > sample / 10).float() for sample in range(GLOBAL_BATCH)])


def step_batches(layout: Layout, distill: Distill) -> list[Batch]:
    samples, weights = RandomSamples(GLOBAL_BATCH), token_weights()
    groups = step_sample_ids(0, global_batch=GLOBAL_BATCH, micro_batch=distill.micro_batch, data_rank=layout.data_rank, data_size=layout.data)
    return [dataclasses.replace(collate(samples, ids), loss_mask_BS=weights[ids]) for ids in groups]


class Answer(NamedTuple):
    """What one process saw."""

    sums: Tensor
    """Of KL, cross-entropy and tokens that count, on the last stage."""
    norm: float
    vocabulary: Tensor | None
    """[v, D] gradient of this stage's output weight, or of its embedding."""
    padding: float
    """Largest gradient in rows behind the vocabulary."""


def load_pair(layout: Layout, world: World, pair: Pair, distill: Distill) -> tuple[HiddenStateGPT, Student]:
    teacher = build_model(pair.teacher, layout, world.platform, torch.float32)
    load_model(teacher, pair.folder / "teacher")
    model = build_model(pair.student, layout, world.platform, torch.float32, output_layer=DistillationOutputLayer, trainable=True)
    load_model(model, pair.folder / "student")
    return teacher, make_student(model, distill)


def first_step(world: World, parallel: Parallel, pair: Pair, distill: Distill, written: Path) -> Answer:
    """Forward, backward, reduction of the gradients; these go to disk as if they were a model."""
    layout = global_layout(parallel, world)
    teacher, student = load_pair(layout, world, pair, distill)
    model = student.model
    student.wrapped.zero_grad_buffer()
    batches = step_batches(layout, distill)
    logged = forward_backward(model, student.wrapped, batches, partial(student.loss, TeacherStates(teacher, batches)))
    sums = torch.zeros(3, dtype=torch.float64)
    for item in logged:
        sums += torch.stack([item[name].double() for name in ("forward_kl", "cross_entropy", "tokens")])
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    student.optimizer.prepare_grads()
    norm = float(student.optimizer.get_grad_norm())
    write_as_model(student, gradients, written, world)
    vocabulary = gradients.get("output_layer.weight", gradients.get("embedding.word_embeddings.weight"))
    padding = vocabulary[model.valid_rows() :] if vocabulary is not None else torch.zeros(0)
    return Answer(sums, norm, vocabulary, float(padding.abs().sum()))


def write_as_model(student: Student, gradients: dict[str, Tensor], folder: Path, world: World) -> None:
    """The gradients in the weights' places: a checkpoint gathers shards by global name, and they are read back by the table."""
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            parameter.copy_(gradients[name])
    if world.is_main:
        folder.mkdir()
    world.barrier()
    save_state(model_state(student.model), folder)


def run_first_step(pool: Pool, parallel: Parallel, pair: Pair, distill: Distill, written: Path) -> FirstStep:
    answers = pool.run(first_step, parallel, pair, distill, written, processes=parallel.processes)
    # one tensor rank of the last stage of every data-parallel rank speaks
    last = [answers[rank] for rank in ([0, 1] if parallel.data == 2 else [parallel.processes - 1])]
    kl, ce, tokens = sum(answer.sums for answer in last).tolist()
    assert [answer.padding for answer in answers] == [0.0] * parallel.processes
    return FirstStep(kl / tokens, ce / tokens, int(tokens), last[0].norm, read_all(written, pair.student))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    found = {name: Pair(arch, tmp_path_factory.mktemp(name)) for name, arch in STUDENTS.items()}
    for pair in found.values():
        write_random(pair.folder / "teacher", pair.teacher, seed=1, scale=0.2)
        write_random(pair.folder / "student", pair.student, seed=2, scale=0.2)
    return found


def plain_first_step(pair: Pair, distill: Distill) -> FirstStep:
    """All samples at once, whole logits, F.kl_div, autograd, fp64."""
    student, teacher = PlainModel(pair.folder / "student", pair.student), PlainModel(pair.folder / "teacher", pair.teacher)
    tokens, weights = RandomSamples(GLOBAL_BATCH).tokens, token_weights().double()
    count = weights.sum()
    kl = kd_loss(student, teacher, tokens[:, :-1], weights, distill.temperature) / count
    ce = cross_entropy(student, tokens[:, :-1], tokens[:, 1:], weights) / count
    (distill.loss.get("forward_kl", 0) * kl + distill.loss.get("cross_entropy", 0) * ce).backward()
    gradients = {name: weight.grad for name, weight in student.weights.items() if weight.grad is not None}
    norm = float(torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt())
    return FirstStep(kl.item(), ce.item(), int(count), norm, gradients)


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


@pytest.mark.parametrize(("shape", "parallel"), LAYOUTS, ids=name_of)
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
    layout = global_layout(ONE, world)
    teacher, student = load_pair(layout, world, pair, settings())
    batches = step_batches(layout, settings())
    states = TeacherStates(teacher, batches)
    logged = forward_only(student.model, batches, consume=lambda hidden, batch: student.loss(states, hidden, batch)[2])
    return sum(float(item["forward_kl"]) for item in logged), student.model.output_layer.gradient_buffer._buffer is not None


def test_validation_has_the_same_loss_and_computes_no_gradient(pool: Pool, pairs: dict[str, Pair], expected: dict[str, FirstStep]) -> None:
    """A gradient here would cost as much as training, and would keep the buffer that training uses again."""
    [(kl, made_a_buffer)] = pool.run(loss_without_gradients, pairs["llama"], processes=1)
    reference = expected["llama"]
    assert relative_difference(kl / reference.tokens, reference.kl) <= 1e-6  # fp32 against fp64
    assert not made_a_buffer
