"""The first distillation step, in any pair of layouts and as a plain fp64 computation: loss, every gradient, what moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from plain_losses import token_losses
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import load_model, model_state, save_state
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.config.distill import Distill, HiddenLoss, Training
from minitron_megatron.config.fp8 import Fp8
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.data.batches import Batch, MicroBatches, collate, micro_batches
from minitron_megatron.distill.hidden.map import Term, hidden_terms
from minitron_megatron.distill.hidden.projection import ATTRIBUTE, initial_weight
from minitron_megatron.distill.hidden.training import HiddenTraining, add_hidden_losses
from minitron_megatron.distill.teacher import Teacher, load_teacher
from minitron_megatron.distill.teachers import settle_teacher
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.run import batches_of_rank, forward_backward
from minitron_megatron.parallel.layout import global_layout, teacher_layout
from minitron_megatron.parallel.split import distillation_work
from minitron_megatron.parallel.world import World
from minitron_megatron.training.output_layer import DistillationOutputLayer
from minitron_megatron.training.student import Student, make_student

from .plain_model import PlainModel, cross_entropy, hidden_loss, kd_loss
from .pool import Pool
from .tiny import RandomSamples, read_all, teacher_of, write_random

GLOBAL_BATCH, MICRO_BATCH = 8, 2


@dataclass(frozen=True)
class Pair:
    """Teacher and student on disk."""

    student: Architecture
    folder: Path
    teacher_hidden: int = 32
    fp8: Fp8 = field(default_factory=Fp8)

    @property
    def teacher(self) -> Architecture:
        return teacher_of(self.student).resized(hidden=self.teacher_hidden)

    def written(self) -> Pair:
        """Random weights of both in the folder."""
        write_random(self.folder / "teacher", self.teacher, seed=1, scale=0.2)
        write_random(self.folder / "student", self.student, seed=2, scale=0.2)
        return self


@dataclass(frozen=True)
class FirstStep:
    """Means over all tokens that count, the norm that the optimizer sees, and where the gradients were written."""

    kl: float
    cross_entropy: float
    tokens: int
    gradient_norm: float
    gradients: dict[str, Tensor]
    hidden: list[float] = dataclasses.field(default_factory=list)
    """Of each comparison of hidden states."""
    projections: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Gradients."""
    answers: list[Answer] = dataclasses.field(default_factory=list)
    others: dict[str, float] = dataclasses.field(default_factory=dict)
    """Losses beside KL and cross-entropy."""


class Answer(NamedTuple):
    """What one process saw."""

    sums: Tensor
    """Of KL, cross-entropy, tokens that count and the other losses by name, on the last stage's first tensor rank."""
    norm: float
    vocabulary: Tensor | None
    """[v, D] gradient of this stage's output weight, or of its embedding."""
    padding: float
    """Largest gradient in rows behind the vocabulary."""
    teacher_parameters: int
    """Of the teacher's model on this rank."""
    teacher_output: int
    """Elements of the teacher's output weight on this rank that are not the embedding's storage."""
    bytes_sent: int
    bytes_kept: int
    hidden: Tensor
    """[terms] this process's sums."""
    projections: list[tuple[str, Tensor]]
    """Name and gradient of each copy of a projection here."""


def settings(**changes: object) -> Distill:
    return Distill(
        **{"steps": 10, "sequence_length": 16, "global_batch": GLOBAL_BATCH, "micro_batch": MICRO_BATCH, "loss_chunk_tokens": 7, **changes}
    )


def token_weights() -> Tensor:
    """[samples, S] zeros, ones and fractions, another number of zeros in each sample, so that a mean of means would show."""
    generator = torch.Generator().manual_seed(5)
    draws = [(sample, torch.rand(16, generator=generator)) for sample in range(GLOBAL_BATCH)]
    return torch.stack([torch.where(draw > 0.8, draw, 1.0) * (draw > sample / 10) for sample, draw in draws])


def step_groups(distill: Distill) -> MicroBatches:
    return micro_batches(0, global_batch=GLOBAL_BATCH, micro_batch=distill.micro_batch)


def load_batch(ids: tuple[int, ...]) -> Batch:
    return dataclasses.replace(collate(RandomSamples(GLOBAL_BATCH), ids), loss_mask_BS=token_weights()[list(ids)])


def load_pair(world: World, parallel: Parallel, pair: Pair, distill: Distill, training: Training | None = None) -> tuple[Teacher, Student]:
    layout = global_layout(parallel, world)
    folder, fp32 = pair.folder / "teacher", torch.float32
    wanted = settle_teacher(parallel, pair.teacher, pair.student, fp32, world)
    own = teacher_layout(wanted, world, layout)
    budget = distill.handover_device_gib * 2**30
    source = MegatronSource(folder, pair.teacher)
    teacher = load_teacher(source, folder, own, layout, world.platform, fp32, budget_bytes=budget, fp8=pair.fp8.of_teacher)
    ends = distillation_work(pair.student, pair.teacher)
    model = build_model(
        pair.student,
        layout,
        world.platform,
        fp32,
        output_layer=DistillationOutputLayer,
        ends=ends,
        trainable=True,
        recompute=training.recompute if training else "none",
        fp8=pair.fp8.of_student,
    )
    load_model(model, pair.folder / "student")
    return teacher, make_student(model, distill, training, hidden_of(model, teacher, pair, distill))


def hidden_of(model: StageModel, teacher: Teacher, pair: Pair, distill: Distill) -> HiddenTraining | None:
    """Projections start at random: at the map of kept channels a mistake in the student's channels could hide."""
    if distill.hidden is None:
        return None
    sizes = {"teacher_layers": pair.teacher.layers, "teacher_hidden": pair.teacher.hidden}
    hidden = add_hidden_losses(model, distill.hidden, **sizes, kept_layers=[], channels=None)
    teacher.listen(hidden.wanted)
    return hidden


def accumulate(teacher: Teacher, student: Student, distill: Distill) -> list[dict[str, Tensor]]:
    """Forward, backward, reduction of the gradients."""
    model, hidden, groups = student.model, student.hidden, step_groups(distill)
    for chunk in student.wrapped:
        chunk.zero_grad_buffer()
    states = teacher.states(groups, load_batch, hidden.wanted if hidden else ())
    batches = batches_of_rank(groups, load_batch, model.layout)
    with hidden.training() if hidden else nullcontext():
        before = partial(hidden.expect, states) if hidden else None
        return forward_backward(model, student.wrapped, batches, partial(student.loss, states), before=before)


def first_step(
    world: World,
    parallel: Parallel,
    pair: Pair,
    distill: Distill,
    written: Path,
    training: Training | None = None,
    prepare: Callable[[Student], None] | None = None,
) -> Answer:
    """What accumulate leaves; the gradients go to disk as if they were a model. prepare: changes the student ahead of it."""
    teacher, student = load_pair(world, parallel, pair, distill, training)
    if prepare:
        prepare(student)
    logged, model = accumulate(teacher, student, distill), student.model
    names = ("forward_kl", "cross_entropy", "tokens", *other_names(distill))
    sums = torch.zeros(len(names), dtype=torch.float64)
    for item in logged if model.layout.tensor_rank == 0 else ():
        sums += torch.stack([item[name].double() for name in names])
    student.optimizer.prepare_grads()
    norm = float(student.optimizer.get_grad_norm())
    gather_gradients(student)
    vocabulary = model.output_weight() if model.layout.is_last_stage else embedding_of(student)
    rows = model.valid_rows() if model.layout.is_last_stage else None
    gradient = None if vocabulary is None else vocabulary.main_grad.clone()  # type: ignore[attr-defined]
    padding = gradient[rows:] if gradient is not None and rows is not None else torch.zeros(0)
    own = sum(parameter.numel() for parameter in teacher.model.parameters())
    shared = {parameter.data_ptr() for parameter in teacher.model.parameters()}
    output = teacher.output_weight_vE
    separate = output.numel() if output is not None and output.data_ptr() not in shared else 0
    hidden = student.hidden.take_sums() if student.hidden else torch.zeros(0)
    projections = [(name, weight.main_grad.clone()) for name, weight in projections_of(student)]
    write_as_model(student, written, world)
    exchange = teacher.exchange
    return Answer(sums, norm, gradient, float(padding.abs().sum()), own, separate, exchange.bytes_sent, exchange.bytes_kept, hidden, projections)


def other_names(distill: Distill) -> list[str]:
    """Of the losses beside KL and cross-entropy that are asked for."""
    return sorted({*distill.loss, *(["forward_kl_top_k"] if distill.top_k else [])} - {"forward_kl", "cross_entropy"})


def projections_of(student: Student) -> list[tuple[str, Any]]:
    """Name and weight of every copy on this process."""
    found = [getattr(chunk, ATTRIBUTE, {}) for chunk in student.model.chunks]
    return [(name, projection.weight) for copies in found for name, projection in copies.items()]


def gather_gradients(student: Student) -> None:
    """After a reduce-scatter each data-parallel rank has its shard of every bucket: all of them make the whole."""
    for wrapped in student.wrapped:
        for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers) if wrapped.ddp_config.use_distributed_optimizer else ():
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def embedding_of(student: Student) -> Tensor | None:
    first = student.model.chunks[0]
    return first.embedding.word_embeddings.weight if first.pre_process else None


def write_as_model(student: Student, folder: Path, world: World) -> None:
    """The gradients in the weights' places: a checkpoint gathers shards by global name, and they are read back by the table."""
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]
    if world.is_main:
        folder.mkdir()
    world.barrier()
    save_state(model_state(student.model), folder)


def run_first_step(pool: Pool, parallel: Parallel, pair: Pair, distill: Distill, written: Path, run: Callable[..., Answer] = first_step) -> FirstStep:
    """run: what each process does, with first_step's first arguments."""
    answers = pool.run(run, parallel, pair, distill, written, processes=parallel.processes)
    kl, ce, tokens, *others = sum(answer.sums for answer in answers).tolist()
    assert [answer.padding for answer in answers] == [0.0] * parallel.processes
    hidden = (sum(answer.hidden for answer in answers) / tokens).tolist()
    projections = {name: gradient for answer in answers for name, gradient in answer.projections}
    named = {name: value / tokens for name, value in zip(other_names(distill), others, strict=True)}
    return FirstStep(kl / tokens, ce / tokens, int(tokens), answers[-1].norm, read_all(written, pair.student), hidden, projections, answers, named)


def plain_first_step(pair: Pair, distill: Distill) -> FirstStep:
    """All samples at once, whole logits, F.kl_div, autograd, fp64; `hidden.weight` is a number."""
    student, teacher = PlainModel(pair.folder / "student", pair.student), PlainModel(pair.folder / "teacher", pair.teacher)
    tokens, weights = RandomSamples(GLOBAL_BATCH).tokens, token_weights().double()
    count = (weights > 0).sum()
    terms = plain_terms(distill.hidden)
    projections = {term.projection: initial_projection(pair, term).double().requires_grad_() for term in terms}
    kl = kd_loss(student, teacher, tokens[:, :-1], weights, distill.temperature) / count
    hidden = [hidden_loss(student, teacher, term, projections[term.projection], distill.hidden.kind, weights) / count for term in terms]
    ce = cross_entropy(student, tokens[:, :-1], tokens[:, 1:], weights) / count
    alpha = float(distill.hidden.weight) if distill.hidden else 0.0
    others = plain_objective(student, teacher, distill, tokens, weights, count)
    known = {"forward_kl": kl, "cross_entropy": ce, **others}
    if distill.top_k:
        known["forward_kl"] = others["forward_kl_top_k"]
    objective = sum(weight * known[name] for name, weight in distill.loss.items())
    (objective + alpha * sum(hidden)).backward()
    gradients = {name: weight.grad for name, weight in student.weights.items() if weight.grad is not None}
    of_projections = {name: weight.grad for name, weight in projections.items() if weight.grad is not None}
    norm = float(torch.stack([gradient.square().sum() for gradient in [*gradients.values(), *of_projections.values()]]).sum().sqrt())
    named = {name: value.item() for name, value in others.items()}
    return FirstStep(kl.item(), ce.item(), int(count), norm, gradients, [item.item() for item in hidden], of_projections, others=named)


def plain_objective(
    student: PlainModel, teacher: PlainModel, distill: Distill, tokens_BS: Tensor, weights_BS: Tensor, count: Tensor
) -> dict[str, Tensor]:
    """Means of the other losses."""
    if not other_names(distill):
        return {}
    with torch.no_grad():
        teacher_NV = teacher.logits(tokens_BS[:, :-1]).flatten(0, 1)
    losses = token_losses(student.logits(tokens_BS[:, :-1]).flatten(0, 1), teacher_NV, distill.temperature, distill.top_k)
    return {name: (losses[name] * weights_BS.flatten()).sum() / count for name in other_names(distill)}


def plain_terms(settings: HiddenLoss | None) -> list[Term]:
    """Of explicit pairs."""
    return [] if settings is None else hidden_terms(settings, settings.pairs)  # type: ignore[arg-type]


def initial_projection(pair: Pair, term: Term) -> Tensor:
    return initial_weight(term.projection, pair.teacher.hidden, pair.student.hidden, None)
