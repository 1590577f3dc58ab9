"""A distillation in the making, step by step in the pool's workers: what it computed, which samples it took, and its optimizer's state by name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import chunk_state, load_model
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.config.distill import Distill, LearningRate, Training
from minitron_megatron.config.fp8 import Fp8
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.distill.teacher import load_teacher
from minitron_megatron.distill.teachers import Teachers, settle_teacher
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import HiddenStateGPT
from minitron_megatron.parallel.layout import Layout, global_layout, teacher_layout
from minitron_megatron.parallel.split import distillation_work
from minitron_megatron.parallel.world import World
from minitron_megatron.training.loop import TrainingLoop
from minitron_megatron.training.optimizer import whole_parameters
from minitron_megatron.training.output_layer import DistillationOutputLayer
from minitron_megatron.training.student import Student, learning_rate_schedule, make_student
from minitron_megatron.training.training_checkpoint import Progress, TrainingCheckpoints

from .tiny import RandomSamples, teacher_of

Piece = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]
"""Name, shape and offset in the whole tensor, data."""
MOMENTS = ("exp_avg", "exp_avg_sq", "main")
DISTRIBUTED = Training(asynchronous_checkpoints=False)
PLAIN = Training(distributed_optimizer=False, asynchronous_checkpoints=False)
OVERLAPPED = Training(overlap_grad_reduce=True, overlap_param_gather=True, asynchronous_checkpoints=False)


@dataclass(frozen=True)
class Job:
    """One start of a run: from the newest checkpoint in the folder, where there is one, to `until`."""

    student: Architecture
    weights: Path
    folder: Path
    parallel: Parallel
    training: Training = PLAIN
    until: int = 5
    save_at: tuple[int, ...] = ()
    global_batch: int = 8
    micro_batch: int = 2
    dtype: torch.dtype = torch.float32
    fp8: Fp8 = field(default_factory=Fp8)

    def settings(self) -> Distill:
        return Distill(
            steps=10,
            sequence_length=16,
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            learning_rate=LearningRate(peak=3e-3, minimum=3e-4, warmup_steps=2),
            loss_chunk_tokens=7,
        )


@dataclass(frozen=True)
class Seen:
    """What one process saw."""

    losses: dict[int, float]
    norms: dict[int, float]
    samples: list[int]
    """Ids that this process read, in order."""
    progress: Progress
    optimizer: str
    state_bytes: int
    weights: list[Piece]
    state: dict[str, list[Piece]]
    """Of the optimizer: as it was loaded, or in a run from the start as it was last saved."""


@dataclass
class WatchedSamples(RandomSamples):
    """Remembers which ids were asked for."""

    taken: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(64)

    def __getitem__(self, sample_id: int) -> Tensor:
        self.taken.append(sample_id)
        return super().__getitem__(sample_id)


def train(world: World, job: Job) -> Seen:
    """Takes the steps, saves where it is to, and tells what it saw."""
    layout, samples = global_layout(job.parallel, world), WatchedSamples()
    arch, folder = teacher_of(job.student), job.weights / "teacher"
    own = teacher_layout(settle_teacher(job.parallel, arch, job.student, job.dtype, world), world, layout)
    source = MegatronSource(folder, arch)
    teacher = load_teacher(source, folder, own, layout, world.platform, job.dtype, budget_bytes=1e9, fp8=job.fp8.of_teacher)
    model = build_model(
        job.student,
        layout,
        world.platform,
        job.dtype,
        output_layer=DistillationOutputLayer,
        ends=distillation_work(job.student, arch),
        trainable=True,
        recompute=job.training.recompute,
        fp8=job.fp8.of_student,
    )
    load_model(model, job.weights / "student")
    student = make_student(model, job.settings(), job.training)
    checkpoints = TrainingCheckpoints(job.folder / "training", world, keep=9, asynchronous=job.training.asynchronous_checkpoints)
    distillation = TrainingLoop("distill", job.settings(), layout, world, Teachers([teacher]), student, samples, samples)
    distillation.progress = checkpoints.load(student)
    first = distillation.progress.step
    state = named_state(layout, student) if first else {}
    losses: dict[int, float] = {}
    norms: dict[int, float] = {}
    schedule = learning_rate_schedule(student.optimizer, job.settings(), first)
    for step in range(first, job.until):
        record = distillation._step(step)
        schedule.step(increment=1)
        checkpoints.poll()
        losses[step], norms[step] = record["loss"], record["gradient_norm"]
        if step + 1 in job.save_at:
            checkpoints.save(distillation.progress, student)
            state = state if first else named_state(layout, student)
    checkpoints.finish()
    with whole_parameters(student.wrapped):
        weights = [piece for chunk in model.chunks for piece in pieces(chunk, dict(chunk.named_parameters()))]
    inner = student.optimizer.chained_optimizers  # experts that are shared out have one of their own
    held = sum(value.nbytes for part in inner for state in part.optimizer.state.values() for value in state.values())
    [kind] = {type(part).__name__ for part in inner}
    return Seen(losses, norms, samples.taken, distillation.progress, kind, held, weights, state)


def pieces(chunk: HiddenStateGPT, tensors: dict[str, Tensor]) -> list[Piece]:
    """Tensors of weights' shapes as parts of global ones: where a part lies is what the model says of its weights."""
    found = []
    for name, entry in chunk_state(chunk).items():
        data = tensors[name].detach().float().clone()
        is_factory = isinstance(entry, ShardedTensorFactory)  # gate and up in one weight are two parts of the whole
        shards = nested_values(replace(entry, data=data).build()) if is_factory else [replace(entry, data=data, dtype=data.dtype)]
        for shard in shards:
            found.append((shard.key, shard.global_shape, shard.global_offset, shard.data[(None,) * shard.prepend_axis_num]))
    return found


def assembled(arch: Architecture, parts: list[list[Piece]]) -> dict[str, Tensor]:
    """Whole tensors by name from every process's pieces; rows behind the vocabulary are left out, whatever is missing is nan."""
    found: dict[str, Tensor] = {}
    for key, shape, offset, data in (piece for process in parts for piece in process):
        whole = found.setdefault(key, torch.full(shape, torch.nan))
        whole[tuple(slice(begin, begin + size) for begin, size in zip(offset, data.shape, strict=True))] = data
    return {key: whole[: arch.vocab] if key in ("embedding.word_embeddings.weight", "output_layer.weight") else whole for key, whole in found.items()}


def named_state(layout: Layout, student: Student) -> dict[str, list[Piece]]:
    """Moments and main parameters of this rank's weights, read out of the optimizers' own tables."""
    optimizers = student.optimizer.chained_optimizers
    named: dict[str, list[Piece]] = {moment: [] for moment in MOMENTS}
    for chunk, wrapped in zip(student.model.chunks, student.wrapped, strict=True):
        found = {}
        for name, parameter in chunk.named_parameters():
            if wrapped.ddp_config.use_distributed_optimizer:
                found[name] = shared_out_state(optimizers, parameter, layout)
            else:
                main = getattr(parameter, "main_param", parameter)
                [state] = [inner.optimizer.state[main] for inner in optimizers if main in inner.optimizer.state]
                found[name] = {**state, "main": main}
        for moment in MOMENTS:
            named[moment] += pieces(chunk, {name: state[moment] for name, state in found.items()})
    return named


def shared_out_state(optimizers: list[Any], parameter: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Each data-parallel or context rank that holds a parameter puts its part of the parameter's state into zeros; the sum is whole."""
    found = {moment: torch.zeros(parameter.numel()) for moment in MOMENTS}
    for inner in [inner for inner in optimizers if parameter in inner.model_param_gbuf_map]:
        part = inner._get_model_param_range_map(parameter)["param"]
        group, order = inner.model_param_group_index_map[parameter]
        main = inner.optimizer.param_groups[group]["params"][order]
        state = {**inner.optimizer.state[main], "main": main.detach()}
        for moment in MOMENTS:
            found[moment][part.start : part.end] = state[moment]
    for whole in found.values():
        dist.all_reduce(whole, group=layout.groups.dp_cp if getattr(parameter, "allreduce", True) else layout.groups.expt_dp)
    return {moment: whole.view(parameter.shape) for moment, whole in found.items()}
