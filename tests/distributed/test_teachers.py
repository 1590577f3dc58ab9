"""Several teachers, and none: the first step of every layout against a plain fp64 computation, and a teacher whose weights are replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.config.distill import Distill, LearningRate, TrainingRun
from minitron_megatron.config.parallel import Parallel, TeacherParallel
from minitron_megatron.distill.teacher import load_teacher
from minitron_megatron.distill.teachers import Teachers, settle_teacher
from minitron_megatron.model.build import build_model
from minitron_megatron.parallel.layout import global_layout, teacher_layout
from minitron_megatron.parallel.split import distillation_work
from minitron_megatron.parallel.world import World
from minitron_megatron.training.output_layer import DistillationOutputLayer
from minitron_megatron.training.student import make_student
from minitron_megatron.training.teachers import NoTeachers

from .conftest import Record
from .first_step import GLOBAL_BATCH, Pair, accumulate, gather_gradients, load_batch, load_pair, settings, step_groups, token_weights, write_as_model
from .plain_model import PlainModel, cross_entropy, kd_loss
from .pool import Pool
from .tiny import (
    DP2,
    LLAMA,
    ONE,
    PP2,
    QWEN2_TIED,
    TP2_PP2,
    TP2_SP,
    RandomSamples,
    layout_name,
    name_of,
    read_all,
    relative_difference,
    with_teacher,
    worst_difference,
    write_random,
)

SECOND = LLAMA.resized(layers=7, hidden=20, ffn=72)
"""Of another family of sizes than the first teacher and the student; their vocabulary."""
SHARES = (0.75, 0.5)
LOSS = {"forward_kl": 0.7, "cross_entropy": 0.4}
APART = with_teacher(PP2, TeacherParallel(tensor=2, sequence=True))
CASES = [(teachers, parallel) for teachers in (2, 0) for parallel in (TP2_SP, PP2, DP2)] + [(2, APART)]
SLOW = [(teachers, parallel) for teachers in (2, 0) for parallel in (ONE, TP2_PP2)] + [(2, with_teacher(TP2_SP, TeacherParallel(pipeline=2)))]


class Sums(dict[str, float]):
    """Of one process's last stage."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    found = Pair(LLAMA, tmp_path_factory.mktemp("three_models")).written()
    write_random(found.folder / "second", SECOND, seed=3, scale=0.3)
    return found


def of_two(world: World, parallel: Parallel, pair: Pair, written: Path) -> Sums:
    """A student of two teachers: what is logged, and its gradients on disk."""
    distill = settings(loss=LOSS)
    first, student = load_pair(world, parallel, pair, distill)
    first.weight = SHARES[0]
    layout, source = student.model.layout, MegatronSource(pair.folder / "second", SECOND)
    own = teacher_layout(settle_teacher(parallel, SECOND, LLAMA, torch.float32, world, others=[pair.teacher]), world, layout)
    second = load_teacher(source, pair.folder / "second", own, layout, world.platform, torch.float32, budget_bytes=2**30, share=SHARES[1])
    return _sums_of_a_step(world, Teachers([first, second]), student, distill, written)


def of_none(world: World, parallel: Parallel, pair: Pair, written: Path) -> Sums:
    run = TrainingRun(steps=10, sequence_length=16, global_batch=GLOBAL_BATCH, micro_batch=2, learning_rate=LearningRate(), loss_chunk_tokens=7)
    layout = global_layout(parallel, world)
    ends = distillation_work(LLAMA)
    model = build_model(LLAMA, layout, world.platform, torch.float32, output_layer=DistillationOutputLayer, ends=ends, trainable=True)
    load_model(model, pair.folder / "student")
    return _sums_of_a_step(world, NoTeachers(), make_student(model, run), run, written)


def _sums_of_a_step(world: World, teachers: object, student: object, run: TrainingRun, written: Path) -> Sums:
    logged = accumulate(teachers, student, run)  # type: ignore[arg-type]
    gather_gradients(student)  # type: ignore[arg-type]
    write_as_model(student, written, world)  # type: ignore[arg-type]
    spoken = logged if student.model.layout.tensor_rank == 0 else []  # type: ignore[attr-defined]
    return Sums({name: sum(float(item[name]) for item in spoken) for name in (logged[0] if logged else ())})


def plain(pair: Pair, teachers: dict[str, float], loss: dict[str, float]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Whole logits, autograd, fp64: (sums, gradients of the mean over tokens that count)."""
    archs = {"teacher": pair.teacher, "second": SECOND}
    student, tokens, weights = PlainModel(pair.folder / "student", LLAMA), RandomSamples(GLOBAL_BATCH).tokens, token_weights().double()
    count = (weights > 0).sum()
    ce = cross_entropy(student, tokens[:, :-1], tokens[:, 1:], weights)
    parts = [share * kd_loss(student, PlainModel(pair.folder / name, archs[name]), tokens[:, :-1], weights) for name, share in teachers.items()]
    kl = torch.stack([*parts, torch.zeros((), dtype=torch.float64)]).sum()
    ((loss.get("forward_kl", 0) * kl + loss["cross_entropy"] * ce) / count).backward()
    gradients = {name: weight.grad for name, weight in student.weights.items() if weight.grad is not None}
    return {"forward_kl": kl.item(), "cross_entropy": ce.item(), "tokens": float(count)}, gradients


@pytest.mark.parametrize(("teachers", "parallel"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)], ids=name_of)
def test_loss_and_gradients_are_those_of_plain_torch_whatever_the_number_of_teachers(
    pool: Pool, pair: Pair, tmp_path: Path, measured: Record, parallel: Parallel, teachers: int
) -> None:
    """fp32 against fp64: 1e-6 for sums, 1e-5 for gradients, as with one teacher."""
    shares = dict(zip(("teacher", "second"), SHARES, strict=True)) if teachers else {}
    expected, gradients = plain(pair, shares, LOSS if teachers else {"cross_entropy": 1.0})
    found = pool.run(of_two if teachers else of_none, parallel, pair, tmp_path / "gradients", processes=parallel.processes)
    names = [name for name in expected if teachers or name != "forward_kl"]
    assert {name for sums in found for name in sums} == set(names)
    for name in names:
        difference = relative_difference(sum(sums.get(name, 0.0) for sums in found), expected[name])
        assert measured(f"{teachers} teachers, first step: {name}", layout_name(parallel), difference) <= 1e-6
    difference, name = worst_difference(read_all(tmp_path / "gradients", LLAMA), gradients)
    assert measured(f"{teachers} teachers, first step: gradients", layout_name(parallel), difference) <= 1e-5, name


Logits = list[Tensor]


def replaced(world: World, parallel: Parallel, before: Path, after: Path, tied: bool) -> tuple[Logits, Logits, Logits]:
    """Logits that the loss would hold the student against: of a teacher, of the same one with other weights, of one loaded with those."""
    arch = (QWEN2_TIED if tied else LLAMA).resized(hidden=32)
    layout = global_layout(parallel, world)
    own = teacher_layout(settle_teacher(parallel, arch, LLAMA, torch.float32, world), world, layout)

    def load(folder: Path) -> Teachers:
        return Teachers([load_teacher(MegatronSource(folder, arch), folder, own, layout, world.platform, torch.float32, budget_bytes=2**30)])

    def logits(teachers: Teachers) -> Logits:
        groups = step_groups(Distill(steps=1, micro_batch=2))
        states = teachers.states(groups, load_batch)
        batches = [load_batch(ids) for ids in groups[layout.data_rank :: layout.data]] if layout.is_last_stage else []
        found = [target.hidden_NE @ target.weight_vE.t() for batch in batches for target in states.targets(batch)]
        dist.barrier()  # as the end of a step: nobody drops a teacher whose states are still on their way
        return found

    changing = load(before)
    first = logits(changing)
    changing.members[0].take_weights(after)
    return first, logits(changing), logits(load(after))


@pytest.mark.parametrize(
    ("parallel", "tied"),
    [(APART, False), (TP2_SP, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((APART, True), (TP2_SP, False), (ONE, True)))],
    ids=name_of,
)
def test_a_teacher_with_replaced_weights_is_the_teacher_that_is_loaded_with_them(pool: Pool, tmp_path: Path, parallel: Parallel, tied: bool) -> None:
    """The output weight too, where it is a tensor of its own on the student's last stage and where it is the embedding: the same bits."""
    arch = (QWEN2_TIED if tied else LLAMA).resized(hidden=32)
    for seed, name in enumerate(("before", "after")):
        write_random(tmp_path / name, arch, seed=seed, scale=0.2)
    seen = pool.run(replaced, parallel, tmp_path / "before", tmp_path / "after", tied, processes=parallel.processes)
    assert any(first for first, _, _ in seen)
    for first, changed, expected in seen:
        assert all(torch.equal(a, b) for a, b in zip(changed, expected, strict=True))
        assert not any(torch.allclose(a, b, rtol=0.1) for a, b in zip(first, expected, strict=True))
