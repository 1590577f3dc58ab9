"""A run that stops under one layout continues under another: same optimizer state to the bit, same losses, each sample once."""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import optimizer
from torch import Tensor

from minitron_megatron.artifact import find_artifact
from minitron_megatron.config.distill import Training
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.errors import TrainingError
from minitron_megatron.parallel.world import World
from minitron_megatron.training.training_checkpoint import TrainingCheckpoints, saved_steps

from .conftest import Identical, Record
from .house import copy_of, publish_stage, recipe_for
from .pool import Pool
from .test_distill import distill_until
from .tiny import (
    CP2,
    DP2,
    EP2,
    EP2_OF_DP4,
    EP2_PP2,
    LLAMA,
    MIXTRAL,
    ONE,
    PP2,
    PP2_EVEN,
    QWEN2_TIED,
    TP2,
    layout_name,
    relative_difference,
    teacher_of,
    write_random,
)
from .training_run import DISTRIBUTED, MOMENTS, OVERLAPPED, PLAIN, Job, Seen, assembled, train

STOP, END = 3, 5
STUDENTS = {"llama": LLAMA, "qwen2_tied": QWEN2_TIED, "mixtral": MIXTRAL}
DP4, TP2_DP2, PP2_DP2 = Parallel(data=4), Parallel(tensor=2, data=2), Parallel(pipeline=2, data=2)
KINDS = {"plain": PLAIN, "distributed": DISTRIBUTED, "overlapped": OVERLAPPED}
PAIRS = [
    ("llama", TP2, "plain", PP2, "plain"),
    ("llama", PP2, "plain", TP2, "plain"),
    ("llama", ONE, "plain", DP2, "overlapped"),
    ("llama", DP2, "plain", ONE, "plain"),
    ("llama", DP2, "overlapped", TP2, "plain"),
    ("llama", DP2, "overlapped", DP4, "distributed"),
    ("llama", CP2, "distributed", ONE, "plain"),
    ("llama", ONE, "plain", CP2, "overlapped"),
    ("qwen2_tied", PP2_EVEN, "plain", DP2, "distributed"),
    # tied embeddings have a bucket of their own, and padding lies between buckets
    ("qwen2_tied", PP2_DP2, "distributed", ONE, "plain"),
    ("mixtral", EP2, "distributed", ONE, "plain"),
    ("mixtral", ONE, "plain", EP2, "overlapped"),
    ("mixtral", EP2, "distributed", DP2, "distributed"),
    pytest.param("mixtral", DP2, "overlapped", EP2, "plain", marks=pytest.mark.slow),
    pytest.param("mixtral", EP2_PP2, "overlapped", EP2_OF_DP4, "distributed", marks=pytest.mark.slow),
    pytest.param("mixtral", EP2_OF_DP4, "distributed", EP2_PP2, "plain", marks=pytest.mark.slow),
]


@dataclass(frozen=True)
class Run:
    """A run that saved at STOP and went on to END."""

    job: Job
    seen: list[Seen]

    def losses(self) -> dict[int, float]:
        return self.seen[-1].losses

    def state(self) -> dict[str, dict[str, Tensor]]:
        return {moment: assembled(self.job.student, [seen.state[moment] for seen in self.seen]) for moment in MOMENTS}

    def weights(self) -> dict[str, Tensor]:
        return assembled(self.job.student, [seen.weights for seen in self.seen])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in STUDENTS}
    for name, arch in STUDENTS.items():
        write_random(found[name] / "teacher", teacher_of(arch), seed=1, scale=0.2)
        write_random(found[name] / "student", arch, seed=2, scale=0.2)
    return found


Whole = Callable[..., Run]


@pytest.fixture(scope="module")
def whole(pool: Pool, weights: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """whole(student, layout, kind): the run that is not interrupted; what it saved at STOP lies in its folder."""
    made: dict[tuple[str, str, str], Run] = {}

    def run(student: str, parallel: Parallel, kind: str) -> Run:
        key = student, layout_name(parallel), kind
        if key not in made:
            job = Job(STUDENTS[student], weights[student], tmp_path_factory.mktemp("whole"), parallel, KINDS[kind], END, (STOP,))
            made[key] = Run(job, pool.run(train, job, processes=parallel.processes))
        return made[key]

    return run


def go_on(pool: Pool, before: Run, parallel: Parallel, kind: str, folder: Path) -> Run:
    shutil.copytree(before.job.folder / "training", folder / "training")
    job = replace(before.job, parallel=parallel, training=KINDS[kind], folder=folder, save_at=())
    return Run(job, pool.run(train, job, processes=parallel.processes))


def assert_same_state(found: Run, expected: Run) -> None:
    for moment, tensors in expected.state().items():
        actual = found.state()[moment]
        assert actual.keys() == tensors.keys()
        assert [name for name, tensor in tensors.items() if not torch.equal(actual[name], tensor)] == [], moment


@pytest.mark.parametrize(
    ("student", "parallel", "kind", "other", "other_kind"), PAIRS, ids=lambda value: getattr(value, "processes", None) and layout_name(value)
)
def test_a_run_continues_under_another_layout(
    pool: Pool,
    whole: Whole,
    measured: Record,
    identical: Identical,
    tmp_path: Path,
    student: str,
    parallel: Parallel,
    kind: str,
    other: Parallel,
    other_kind: str,
) -> None:
    """The state is moved, not computed: exact. Steps after it sum in another order, which Adam's division by √v carries into the
    weights: 1e-6 on losses of two steps, and weights within a thousandth of a step's length; a lost moment moves them by whole steps.
    """
    expected = whole(student, parallel, kind)
    found = go_on(pool, expected, other, other_kind, tmp_path)
    name = f"{layout_name(parallel)} → {layout_name(other)}"
    assert_same_state(found, expected)
    assert identical("optimizer's moments and main parameters, moved to another layout", name, True)
    assert sorted(found.losses()) == list(range(STOP, END))
    for step, loss in found.losses().items():
        assert measured("continued under another layout: loss", name, relative_difference(loss, expected.losses()[step])) <= 1e-6
    step_length = expected.job.settings().learning_rate.peak
    moved = max(float((tensor - found.weights()[weight]).abs().max()) for weight, tensor in expected.weights().items()) / step_length
    assert measured("continued under another layout: weights, in steps", name, moved) <= 1e-3
    assert found.seen[0].optimizer == ("DistributedOptimizer" if other_kind != "plain" else "FP32Optimizer")


@pytest.mark.parametrize(("parallel", "kind"), [(TP2, "plain"), (DP2, "overlapped"), (CP2, "distributed")], ids=["tp2", "dp2 overlapped", "cp2"])
def test_under_the_same_layout_it_continues_to_the_bit(pool: Pool, whole: Whole, tmp_path: Path, parallel: Parallel, kind: str) -> None:
    expected = whole("llama", parallel, kind)
    found = go_on(pool, expected, parallel, kind, tmp_path)
    assert found.losses() == {step: expected.losses()[step] for step in range(STOP, END)}
    assert found.seen[0].norms == {step: expected.seen[0].norms[step] for step in range(STOP, END)}
    assert all(torch.equal(found.weights()[name], tensor) for name, tensor in expected.weights().items())


BF16_PAIRS = [
    ("llama", DP2, "distributed", TP2, "plain"),
    ("llama", TP2, "plain", DP2, "overlapped"),
    pytest.param("mixtral", EP2, "distributed", ONE, "plain", marks=pytest.mark.slow),
    pytest.param("mixtral", ONE, "plain", EP2, "distributed", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("student", "parallel", "kind", "other", "other_kind"), BF16_PAIRS)
def test_bf16_main_parameters_move_between_plain_and_distributed_optimizers(
    pool: Pool, weights: dict[str, Path], tmp_path: Path, student: str, parallel: Parallel, kind: str, other: Parallel, other_kind: str
) -> None:
    """fp32 main parameters hold what bf16 weights cannot: made anew from the weights they would not be exact."""
    job = Job(STUDENTS[student], weights[student], tmp_path / "before", parallel, KINDS[kind], 2, (2,), dtype=torch.bfloat16)
    before = Run(job, pool.run(train, job, processes=parallel.processes))
    assert any(not tensor.equal(tensor.bfloat16().float()) for tensor in before.state()["main"].values())
    after = go_on(pool, before, other, other_kind, tmp_path / "after")
    assert_same_state(after, before)


def train_with_torchs_adam(world: World, job: Job) -> Seen:
    """As on CUDA without Transformer Engine and apex, over one data-parallel rank; over more platform/engine_needs.py refuses it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "USING_PYTORCH_OPTIMIZER", True)
        return train(world, job)


def test_torchs_own_adam_continues(pool: Pool, whole: Whole, tmp_path: Path) -> None:
    """Its weights differ from the one-pass kernel's in the last bit: losses to fp32's rounding."""
    expected = whole("llama", ONE, "plain")
    shutil.copytree(expected.job.folder / "training", tmp_path / "training")
    [seen] = pool.run(train_with_torchs_adam, replace(expected.job, folder=tmp_path, save_at=()), processes=1)
    assert seen.losses == pytest.approx({step: expected.losses()[step] for step in range(STOP, END)}, rel=1e-6)


def test_two_ranks_share_out_the_state_and_overlap_changes_no_bit(whole: Whole) -> None:
    plain, overlapped, one = (whole("llama", parallel, kind) for parallel, kind in ((DP2, "plain"), (DP2, "overlapped"), (ONE, "plain")))
    held = [seen.state_bytes for seen in overlapped.seen]
    assert [seen.state_bytes for seen in plain.seen] == [one.seen[0].state_bytes] * 2
    assert max(held) < 0.55 * one.seen[0].state_bytes  # buckets are padded, and a weight's parts are not halves
    assert overlapped.losses() == plain.losses()


def test_tensor_and_data_parallel_with_overlaps_and_recompute_train_like_one_process(
    pool: Pool, whole: Whole, measured: Record, tmp_path: Path
) -> None:
    """Sums in another order: 1e-6 on the first loss; five steps drift by what Adam makes of it (1e-5)."""
    expected = whole("llama", ONE, "plain")
    training = OVERLAPPED.model_copy(update={"recompute": "full"})
    job = replace(expected.job, parallel=TP2_DP2, training=training, save_at=(), folder=tmp_path)
    losses = pool.run(train, job, processes=4)[-1].losses
    assert measured("distributed, overlapped, recomputed: first loss", "tp2_dp2", relative_difference(losses[0], expected.losses()[0])) <= 1e-6
    drift = max(relative_difference(losses[step], loss) for step, loss in expected.losses().items())
    assert measured("distributed, overlapped, recomputed: five losses", "tp2_dp2", drift) <= 1e-5


@pytest.mark.parametrize(("student", "parallel"), [("llama", PP2), ("mixtral", EP2)])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_no_bit(
    pool: Pool, whole: Whole, tmp_path: Path, identical: Identical, student: str, parallel: Parallel, recompute: str
) -> None:
    expected = whole(student, parallel, "distributed" if student == "mixtral" else "plain")
    training = expected.job.training.model_copy(update={"recompute": recompute})
    job = replace(expected.job, training=training, save_at=(), folder=tmp_path)
    found = Run(job, pool.run(train, job, processes=2))
    assert found.losses() == expected.losses()
    assert found.seen[0].norms == expected.seen[0].norms
    same = all(torch.equal(found.weights()[name], tensor) for name, tensor in expected.weights().items())
    assert identical("distillation steps with activation recompute, as without", f"{student} {layout_name(parallel)}, {recompute}", same)


def test_every_sample_is_taken_once_when_data_parallel_size_and_global_batch_change(pool: Pool, weights: dict[str, Path], tmp_path: Path) -> None:
    """3 steps of 8, 2 of 4 on two ranks, 2 of 12 on one: ids 0 … 55."""
    job = Job(LLAMA, weights["llama"], tmp_path, ONE, PLAIN, 3, (3,))
    taken: list[int] = []
    for start in (
        job,
        replace(job, parallel=DP2, training=DISTRIBUTED, global_batch=4, until=5, save_at=(5,)),
        replace(job, global_batch=12, micro_batch=3, until=7, save_at=()),
    ):
        seen = pool.run(train, start, processes=start.parallel.processes)
        taken += sorted(sample for process in seen for sample in process.samples)
    assert taken == list(range(56))
    assert (seen[0].progress.step, seen[0].progress.samples) == (7, 56)


def test_an_unfinished_stage_is_found_again_with_another_global_batch_and_says_so(pool: Pool, house: Path, tmp_path: Path) -> None:
    runs = copy_of(house, tmp_path / "runs")
    settings = {"steps": 6, "save_every_steps": 2, "validate_every_steps": 3}
    pool.run(distill_until, recipe_for(runs, ONE, **settings), 5, processes=1)
    other = recipe_for(runs, DP2, **{**settings, "global_batch": 8, "save_every_steps": 3})
    pool.run(publish_stage, "distill", other, processes=2)
    artifact = find_artifact(runs / "tiny", "distill")
    assert artifact is not None
    first, second = artifact.result["starts"]
    assert (first["step"], first["global_batch"], first["layout"]) == (0, 4, "tensor 1 × pipeline 1 × data 1")
    assert (second["step"] in (2, 4), second["global_batch"], second["layout"]) == (True, 8, "tensor 1 × pipeline 1 × data 2")
    assert artifact.result["tokens"] == 16 * (second["step"] * 4 + (6 - second["step"]) * 8)
    steps = [json.loads(line)["step"] for line in (artifact.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(7))


def save_with_a_full_disk(world: World, job: Job) -> str:
    """The message of a run whose second process cannot write."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:

            def full(*_: object, **__: object) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(filesystem_async, "_write_item", full)  # forked writers inherit it
        with pytest.raises(TrainingError) as caught:
            train(world, job)
    return str(caught.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_write_that_fails_raises_its_reason_on_every_process_and_the_older_checkpoint_serves(
    pool: Pool, weights: dict[str, Path], tmp_path: Path, asynchronous: bool
) -> None:
    training = PLAIN.model_copy(update={"asynchronous_checkpoints": asynchronous})
    job = Job(LLAMA, weights["llama"], tmp_path, PP2, training, 2, (1,))
    pool.run(train, job, processes=2)
    messages = pool.run(save_with_a_full_disk, replace(job, save_at=(2,)), processes=2)
    for message in messages:
        assert "a checkpoint could not be written: process 1:" in message
        assert "No space left on device" in message or "OSError" in message  # megatron-core 0.19.2 passes on the class alone
    assert saved_steps(tmp_path / "training") == [1]
    seen = pool.run(train, replace(job, save_at=()), processes=2)
    assert sorted(seen[-1].losses) == [1]


def save_and_look(world: World, job: Job) -> list[list[int]]:
    """Names after the save began, while its writer is held up, and after it is through."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    held, seen = job.folder / "hold", []
    write, save = filesystem_async._write_item, TrainingCheckpoints.save

    @functools.wraps(write)  # megatron looks at the signature
    def wait(*arguments: object, **options: object) -> object:
        while held.exists():
            time.sleep(0.01)
        return write(*arguments, **options)

    def watched(self: TrainingCheckpoints, *arguments: Any) -> None:
        save(self, *arguments)
        self.poll()
        world.barrier()
        seen.append(saved_steps(job.folder / "training"))
        world.barrier()
        held.unlink(missing_ok=True)
        self.finish()
        seen.append(saved_steps(job.folder / "training"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filesystem_async, "_write_item", wait)
        patch.setattr(TrainingCheckpoints, "save", watched)
        train(world, job)
    return seen


def test_a_checkpoint_has_its_name_only_when_every_process_has_written(pool: Pool, weights: dict[str, Path], tmp_path: Path) -> None:
    """Training is not held up: the save returns while its writers still wait. What is written is the state of that step, not a later one."""
    (tmp_path / "hold").touch()
    job = Job(LLAMA, weights["llama"], tmp_path, DP2, Training(), 2, (1,))
    assert pool.run(save_and_look, job, processes=2) == [[[], [1]]] * 2


def test_a_checkpoint_that_is_written_during_the_next_steps_is_of_its_own_step(pool: Pool, whole: Whole, tmp_path: Path) -> None:
    expected = whole("llama", DP2, "overlapped")
    training = OVERLAPPED.model_copy(update={"asynchronous_checkpoints": True})
    job = replace(expected.job, folder=tmp_path, training=training)
    found = go_on(pool, Run(job, pool.run(train, job, processes=2)), DP2, "overlapped", tmp_path / "again")
    assert found.losses() == {step: expected.losses()[step] for step in range(STOP, END)}
    assert all(torch.equal(found.weights()[name], tensor) for name, tensor in expected.weights().items())
