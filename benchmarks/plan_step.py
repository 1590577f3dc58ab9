"""A distillation in memory alone for plan_memory.py: random weights, random tokens, the loop that a run has; and what the plan counts for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.distill import Distill, LearningRate, Training
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.prune import Prune, Target
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.source import Data, Model
from minitron_megatron.distill.exchange import Exchange
from minitron_megatron.distill.hidden.training import add_hidden_losses
from minitron_megatron.distill.teacher import Teacher, output_weight
from minitron_megatron.distill.teachers import Teachers, settle_teacher
from minitron_megatron.model.build import build_model
from minitron_megatron.model.precision import torch_dtype
from minitron_megatron.parallel.layout import global_layout, teacher_layout
from minitron_megatron.parallel.split import distillation_work
from minitron_megatron.parallel.world import World
from minitron_megatron.plan.case import Case
from minitron_megatron.plan.cluster import Cluster
from minitron_megatron.plan.memory import training_memory
from minitron_megatron.plan.stages import training_plan
from minitron_megatron.training.loop import TrainingLoop
from minitron_megatron.training.output_layer import DistillationOutputLayer
from minitron_megatron.training.student import make_student

EXACT = {"weights": "weights", "gradients": "gradients (fp32)", "optimizer": "optimizer", "teacher": "teacher's weights"}


class RandomTokens:
    """A TokenDataset."""

    def __init__(self, samples: int, length: int, vocab: int) -> None:
        self._samples = torch.randint(vocab, (samples, length + 1))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, sample_id: int) -> Tensor:
        return self._samples[sample_id]


class RandomSource:
    """What a teacher's output weight is read from."""

    def __init__(self, arch: Architecture) -> None:
        self.arch = arch

    def read(self, row: Any, rows: range) -> Tensor:
        return 0.02 * torch.randn(len(rows), self.arch.hidden)


def architectures(shape: Any) -> tuple[Architecture, Architecture]:
    """Student, teacher."""
    student = Architecture(**shape.student)
    return student, student.resized(**shape.teacher)


def recipe_of(shape: Any) -> Recipe:
    student, _ = architectures(shape)
    rate = LearningRate(peak=1e-4, minimum=1e-5, warmup_steps=2)
    sizes = {"steps": 10, "global_batch": 4, "micro_batch": 2, "learning_rate": rate, "loss_memory_mib": 8, **shape.distill}
    return Recipe(
        name="shape",
        platform="cpu",
        precision=shape.precision,
        model=Model(path="nowhere"),
        data=Data(train=["nothing"]),
        parallel=Parallel(**shape.parallel),
        prune=Prune(target=Target(layers=student.layers, hidden=student.hidden, ffn=student.ffn)),
        distill=Distill(**sizes),
        training=Training(**shape.training),
    )


def build(shape: Any, world: World) -> TrainingLoop:
    recipe, (arch, of_teacher) = recipe_of(shape), architectures(shape)
    layout, dtype = global_layout(recipe.parallel, world), torch_dtype(recipe.precision)
    own = teacher_layout(settle_teacher(recipe.parallel, of_teacher, arch, dtype, world), world, layout)
    frozen = build_model(of_teacher, own, world.platform, dtype, output_layer=None)
    for chunk in frozen.chunks:
        randomize(chunk)
    weight = output_weight(RandomSource(of_teacher), frozen, layout, dtype) if layout.is_last_stage else None  # type: ignore[arg-type]
    budget = recipe.distill.handover_device_gib * 2**30
    teacher = Teacher(frozen, layout, weight, Exchange(own, layout, dist.new_group(), world.platform.device), budget, world.platform)
    ends, output = distillation_work(arch, of_teacher), DistillationOutputLayer
    model = build_model(arch, layout, world.platform, dtype, output_layer=output, ends=ends, trainable=True, recompute=recipe.training.recompute)
    for chunk in model.chunks:
        randomize(chunk)
    hidden, settings = None, recipe.distill
    if settings.hidden:
        sizes = {"teacher_layers": of_teacher.layers, "teacher_hidden": of_teacher.hidden}
        hidden = add_hidden_losses(model, settings.hidden, **sizes, kept_layers=list(range(arch.layers)), channels=None)
        teacher.listen(hidden.wanted)
    student = make_student(model, settings, recipe.training, hidden)
    tokens = RandomTokens(4 * settings.global_batch, settings.sequence_length, arch.vocab)
    return TrainingLoop("distill", settings, layout, world, Teachers([teacher]), student, tokens, tokens)


def randomize(chunk: nn.Module) -> None:
    for parameter in chunk.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.02)


def exact_bytes(loop: TrainingLoop) -> dict[str, int]:
    """Of what lies in this process: weights, gradient buffers, what the optimizer keeps, the teacher's own weights."""
    student, teachers = loop.student, loop.teachers.members  # type: ignore[attr-defined]
    buffers = [buffer for chunk in student.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = [parameter for chunk in student.model.chunks for parameter in chunk.parameters()]
    state = [value for inner in student.optimizer.chained_optimizers for one in inner.optimizer.state.values() for value in one.values()]
    mains = [main for weight in weights if isinstance(main := getattr(weight, "main_param", None), Tensor)]
    return {
        "weights": storages(weights),
        "gradients": storages([buffer.grad_data for buffer in buffers]),
        "optimizer": storages([*[value for value in state if isinstance(value, Tensor)], *mains]),
        "teacher": storages([parameter for member in teachers for chunk in member.model.chunks for parameter in chunk.parameters()]),
    }


def storages(tensors: list[Any]) -> int:
    """Each once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def counted(shape: Any, loop: TrainingLoop) -> dict[str, Any]:
    """The plan's figures for this process."""
    student, teacher = architectures(shape)
    layout = loop.layout
    case = Case(recipe_of(shape), teacher, student, Cluster(None, 2))
    plan = training_plan(case, "distill")
    memory = training_memory(plan, layout.stage, data_rank=layout.groups.dp_cp.rank())
    return {
        "exact": {name: memory.parts.get(part, 0) for name, part in EXACT.items()},
        "kept": plan.kept(layout.stage)[0],
        "peak": memory.total,
        "parts": memory.parts,
        "moment": memory.fullest,
    }
