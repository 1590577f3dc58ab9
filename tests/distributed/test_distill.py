"""The distillation stage from artifacts to artifact: layouts agree, an interrupted run is as the whole one, the teacher stays frozen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.monkeypatch import MonkeyPatch

from minitron_megatron.artifact import find_artifact
from minitron_megatron.checkpoint.torch_dist import MegatronSource, TorchDistReader, weights_digest
from minitron_megatron.config.distill import HiddenLoss, Wandb
from minitron_megatron.config.parallel import Parallel, TeacherParallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.distill.handover import HandoverStore, Held
from minitron_megatron.parallel.world import World
from minitron_megatron.training import output_layer
from minitron_megatron.training.loop import TrainingLoop
from minitron_megatron.training.training_checkpoint import Progress, TrainingCheckpoints, saved_steps

from .conftest import Identical, Record
from .house import SOURCE, STEPS, TARGET, copy_of, publish_stage, recipe_for
from .pool import Pool
from .tiny import DP2, ONE, PP2, PP2_VPP2, TP2_SP, layout_name, name_of, relative_difference, with_teacher

TIMED = ("seconds", "tokens_per_second", "memory_gib")
BEFORE_THE_FIRST_CHECKPOINT, JUST_SAVED, UNSAVED_STEPS = 3, 8, 13
"""Checkpoints are written after steps 8 and 16."""


class Interrupted(Exception):
    """Stands for whatever ends a job."""


@dataclass(frozen=True)
class Seen:
    """One process's teacher after training."""

    parameters: int
    trainable: int
    with_gradient: int
    changed: bool
    same_storage: int


@contextmanager
def changed(target: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    with MonkeyPatch.context() as patch:
        patch.setattr(target, name, make(getattr(target, name)))
        yield


def distill_until(world: World, recipe: Recipe, finished: int, stage: str = "distill") -> None:
    """Runs the stage and stops it on every process when so many steps are behind it, with their log lines and checkpoints."""

    def make(take_step: Any) -> Any:
        def stopping(self: TrainingLoop, step: int) -> dict[str, Any]:
            if step == finished:
                raise Interrupted
            return take_step(self, step)

        return stopping

    with changed(TrainingLoop, "_step", make), pytest.raises(Interrupted):
        publish_stage(world, stage, recipe)


def distill_until_half_written(world: World, recipe: Recipe, finished: int) -> None:
    """Stops the stage when this step's checkpoint is written but does not have its name yet."""

    def make(publish: Any) -> Any:
        def stopping(self: TrainingCheckpoints, progress: Progress, unfinished: Path) -> None:
            if progress.step == finished:
                raise Interrupted
            publish(self, progress, unfinished)

        return stopping

    with changed(TrainingCheckpoints, "_publish", make), pytest.raises(Interrupted):
        publish_stage(world, "distill", recipe)


def distill_watching_the_teacher(world: World, recipe: Recipe) -> Seen:
    found: list[Seen] = []

    def make(run: Any) -> Any:
        def watched(self: TrainingLoop, *arguments: Any) -> Any:
            [frozen] = self.teachers.members
            weight = frozen.output_weight_vE
            teacher = [*frozen.model.parameters(), *([] if weight is None else [weight])]
            before = [parameter.clone() for parameter in teacher]
            last = run(self, *arguments)
            student = {parameter.data_ptr() for parameter in self.student.model.parameters()}
            found.append(
                Seen(
                    parameters=sum(parameter.numel() for parameter in teacher),
                    trainable=sum(parameter.requires_grad for parameter in teacher),
                    with_gradient=sum(parameter.grad is not None or hasattr(parameter, "main_grad") for parameter in teacher),
                    changed=any(not torch.equal(a, b) for a, b in zip(before, teacher, strict=True)),
                    same_storage=sum(parameter.data_ptr() in student for parameter in teacher),
                )
            )
            return last

        return watched

    with changed(TrainingLoop, "run", make):
        publish_stage(world, "distill", recipe)
    return found[0]


def distill_seeing_types(world: World, recipe: Recipe) -> tuple[set[torch.dtype], set[torch.dtype], set[torch.dtype]]:
    """Publishes the stage; types of the teacher's weights, of its states as they arrive at the student, and of the student's weights."""
    found: list[tuple[set[torch.dtype], set[torch.dtype]]] = []
    states: set[torch.dtype] = set()

    def make_put(put: Any) -> Any:
        def watched(self: HandoverStore, key: Any, held: Held) -> None:
            states.add(held.states.dtype)
            put(self, key, held)

        return watched

    def make(run: Any) -> Any:
        def watched(self: TrainingLoop, *arguments: Any) -> Any:
            [frozen] = self.teachers.members
            teacher = [*frozen.model.parameters(), *([] if frozen.output_weight_vE is None else [frozen.output_weight_vE])]
            found.append(({weight.dtype for weight in teacher}, {weight.dtype for weight in self.student.model.parameters()}))
            return run(self, *arguments)

        return watched

    with changed(TrainingLoop, "run", make), changed(HandoverStore, "put", make_put):
        publish_stage(world, "distill", recipe)
    [(teacher, student)] = found
    return teacher, states, student


def distill_without_the_loss(world: World, recipe: Recipe) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise Interrupted("the KD loss was called")

    with changed(output_layer, "fused_distillation_loss", lambda _: refuse), pytest.raises(Interrupted):
        publish_stage(world, "distill", recipe)


@dataclass(frozen=True)
class Run:
    """A published distillation."""

    path: Path
    seen: list[Seen]

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def bits(self) -> list[dict[str, Any]]:
        """Every record without what the clock says; JSON keeps all bits of a float."""
        return [{name: value for name, value in record.items() if name not in TIMED} for record in self.records()]

    def steps(self, name: str) -> list[float]:
        return [record[name] for record in self.records() if record["step"] > 0]

    def digest(self) -> str:
        return weights_digest(MegatronSource(self.path / "checkpoint", TARGET))


Whole = Callable[..., Run]


@pytest.fixture(scope="module")
def whole(pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """whole(layout, precision, steps): the uninterrupted run, made once."""
    made: dict[tuple[str, str, int], Run] = {}

    def run(parallel: Parallel, precision: str = "fp32", steps: int = STEPS) -> Run:
        key = layout_name(parallel), precision, steps
        if key not in made:
            runs = copy_of(house, tmp_path_factory.mktemp("whole") / "runs")
            recipe = recipe_for(runs, parallel, precision, steps=steps)
            made[key] = Run(runs / "tiny" / "distill", pool.run(distill_watching_the_teacher, recipe, processes=parallel.processes))
        return made[key]

    return run


@pytest.mark.parametrize(
    ("parallel", "precision"),
    [
        (PP2, "fp32"),
        (DP2, "fp32"),
        (PP2_VPP2, "fp32"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((ONE, "fp32"), (ONE, "bf16"), (PP2, "bf16"), (TP2_SP, "bf16"))),
    ],
    ids=name_of,
)
def test_an_interrupted_run_reproduces_the_whole_one_to_the_bit(
    pool: Pool, house: Path, whole: Whole, tmp_path: Path, identical: Identical, parallel: Parallel, precision: str
) -> None:
    expected = whole(parallel, precision)
    recipe = recipe_for(copy_of(house, tmp_path / "runs"), parallel, precision)
    for step in (BEFORE_THE_FIRST_CHECKPOINT, JUST_SAVED, UNSAVED_STEPS):
        pool.run(distill_until, recipe, step, processes=parallel.processes)
        assert find_artifact(tmp_path / "runs" / "tiny", "distill") is None
        assert saved_steps(tmp_path / "runs" / "tiny" / ".distill.partial" / "training") == ([] if step < JUST_SAVED else [8])
    pool.run(publish_stage, "distill", recipe, processes=parallel.processes)
    continued = Run(tmp_path / "runs" / "tiny" / "distill", [])
    assert [record["step"] for record in continued.records()] == list(range(STEPS + 1))  # 0 is the validation ahead of all
    same = continued.bits() == expected.bits() and continued.digest() == expected.digest()
    assert identical("an interrupted and resumed distillation, as the whole one", f"{layout_name(parallel)} {precision}", same)


def test_a_half_written_checkpoint_is_never_read(pool: Pool, house: Path, whole: Whole, tmp_path: Path) -> None:
    runs = copy_of(house, tmp_path / "runs")
    pool.run(distill_until_half_written, recipe_for(runs), 16, processes=1)
    training = runs / "tiny" / ".distill.partial" / "training"
    for file in training.glob("writing_00000016_*/*.distcp"):
        file.write_bytes(file.read_bytes()[:100])  # what a job that is killed leaves behind
    assert sorted(folder.name[:16] for folder in training.iterdir()) == ["step_00000008", "writing_00000016"]
    pool.run(publish_stage, "distill", recipe_for(runs), processes=1)
    assert Run(runs / "tiny" / "distill", []).bits() == whole(ONE).bits()


def test_a_teacher_in_bf16_teaches_a_student_in_fp32_in_every_layout(pool: Pool, house: Path, whole: Whole, tmp_path: Path) -> None:
    """Its states travel in its own type, of two layouts to another; what it rounds is what its loss differs by."""
    bf16, fp32, losses = {torch.bfloat16}, {torch.float32}, {}
    for number, parallel in enumerate((ONE, with_teacher(TP2_SP, TeacherParallel(pipeline=2)))):
        runs = copy_of(house, tmp_path / str(number))
        recipe = recipe_for(runs, parallel, steps=4, hidden=HiddenLoss()).model_copy(update={"teacher_precision": "bf16"})
        seen = pool.run(distill_seeing_types, recipe, processes=parallel.processes)
        assert all(teacher == bf16 and states <= bf16 and student == fp32 for teacher, states, student in seen)
        assert any(states for _, states, _ in seen)
        losses[number] = Run(runs / "tiny" / "distill", []).steps("forward_kl")
    exact = whole(ONE, "fp32").steps("loss")[0]
    assert losses[0][0] != exact and relative_difference(losses[0][0], exact) < 1e-2  # 8 bits of the teacher's states and logits
    assert max(relative_difference(a, b) for a, b in zip(losses[1], losses[0], strict=True)) < 1e-2


def test_losses_and_gradient_norms_of_twenty_steps_agree_in_every_layout(whole: Whole, measured: Record) -> None:
    """Later steps drift by what Adam makes of rounding: 1e-4 for 20 steps, where another sample would be 1e-1."""
    one = whole(ONE, "fp32")
    assert len(one.steps("loss")) == STEPS
    assert one.steps("loss")[-1] < 0.9 * one.steps("loss")[0]  # it learns: agreement on a flat line would say nothing
    for parallel in (DP2, PP2, TP2_SP, PP2_VPP2, with_teacher(TP2_SP, TeacherParallel(pipeline=2))):
        found = whole(parallel, "fp32")
        for name in ("loss", "gradient_norm", "learning_rate"):
            pairs = zip(found.steps(name), one.steps(name), strict=True)
            difference = max(relative_difference(a, b) for a, b in pairs)
            assert measured(f"20 distillation steps: {name}", layout_name(parallel), difference) <= 1e-4


@pytest.mark.parametrize("parallel", [ONE, PP2, DP2, TP2_SP, PP2_VPP2], ids=name_of)
def test_the_teacher_stays_frozen(whole: Whole, parallel: Parallel) -> None:
    for item in whole(parallel, "fp32").seen:
        assert item.parameters > 0
        assert (item.trainable, item.with_gradient, item.changed, item.same_storage) == (0, 0, False, 0)


def test_neither_published_nor_training_checkpoints_hold_the_teacher(pool: Pool, house: Path, whole: Whole, tmp_path: Path) -> None:
    """The teacher has one layer more than the student, and wider ones."""
    recipe = recipe_for(copy_of(house, tmp_path / "runs"), PP2)
    pool.run(distill_until, recipe, JUST_SAVED, processes=2)
    training = TorchDistReader(tmp_path / "runs" / "tiny" / ".distill.partial" / "training" / "step_00000008").tensors
    published = TorchDistReader(whole(PP2, "fp32").path / "checkpoint").tensors
    assert f"decoder.layers.{TARGET.layers - 1}.mlp.linear_fc1.weight" in published
    for name, entry in [*training.items(), *published.items()]:
        assert f"layers.{SOURCE.layers - 1}." not in name
        assert not {SOURCE.hidden, SOURCE.ffn, 2 * SOURCE.ffn} & set(entry.size), name


def test_without_the_kd_loss_nothing_is_trained(pool: Pool, house: Path, tmp_path: Path) -> None:
    """The stage must fail when the function that makes the loss does: no other path may stand in for it."""
    recipe = recipe_for(copy_of(house, tmp_path / "runs"), ONE)
    pool.run(distill_without_the_loss, recipe, processes=1)
    assert find_artifact(tmp_path / "runs" / "tiny", "distill") is None


def test_tensorboard_and_offline_wandb_hold_every_step(pool: Pool, house: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = copy_of(house, tmp_path / "runs")
    recipe = recipe_for(runs, ONE, steps=4, wandb=Wandb(project="tiny", mode="offline"))
    pool.run(publish_stage, "distill", recipe, processes=1)
    run = Run(runs / "tiny" / "distill", [])
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    plotted = events.Scalars("train/loss")
    assert [event.step for event in plotted] == [1, 2, 3, 4]
    assert [event.value for event in plotted] == pytest.approx(run.steps("loss"), rel=1e-6)  # TensorBoard keeps fp32
    assert list(run.path.glob("wandb/offline-run-*/run-*.wandb"))
