"""What a training stage publishes where its weights are FP8: the fp32 main copy in bf16, under any layout and either optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import load_model, save_state
from minitron_megatron.config.distill import Distill, Training
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.model.build import build_model
from minitron_megatron.model.fp8 import weights as fp8_weights
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.training import optimizer, published
from minitron_megatron.training.output_layer import DistillationOutputLayer
from minitron_megatron.training.student import Student, make_student
from minitron_megatron.training.training_checkpoint import Progress, TrainingCheckpoints

from .pool import Pool
from .tiny import DP2, EP2, LLAMA, MIXTRAL, ONE, QWEN2_TIED, TP2_PP2, layout_name, read_all, write_random
from .training_run import DISTRIBUTED, OVERLAPPED, PLAIN

CASES = [
    ("llama", LLAMA, ONE, PLAIN),
    ("llama", LLAMA, DP2, DISTRIBUTED),
    ("qwen2_tied", QWEN2_TIED, TP2_PP2, PLAIN),
    ("mixtral", MIXTRAL, EP2, DISTRIBUTED),
]


def student_of(world: World, parallel: Parallel, arch: Architecture, source: Path, training: Training) -> Student:
    layout = global_layout(parallel, world)
    model = build_model(arch, layout, world.platform, torch.bfloat16, output_layer=DistillationOutputLayer, trainable=True)
    load_model(model, source)
    student = make_student(model, Distill(steps=10), training)
    for part in student.optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)  # moments, which come to be with the first step
    return student


def spoil_weights(student: Student) -> None:
    """In the place of what FP8 rounds away: every weight an eighth too large, its main copy as it was."""
    for parameter in student.model.parameters():
        parameter.data.mul_(1.125)


def publish_spoilt(world: World, parallel: Parallel, arch: Architecture, source: Path, target: Path, training: Training, rounded: bool) -> None:
    student = student_of(world, parallel, arch, source, training)
    spoil_weights(student)
    with patched(published, "are_rounded", rounded):
        state = published.published_state(student)
    if world.is_main:
        target.mkdir()
    world.barrier()
    save_state(state, target)


class patched:
    """A module's name for a question, answered otherwise while the block runs: TransformerConfig takes no FP8 weights without Transformer Engine."""

    def __init__(self, module: Any, name: str, answer: bool) -> None:
        self._module, self._name, self._answer, self._before = module, name, answer, getattr(module, name)

    def __enter__(self) -> None:
        setattr(self._module, self._name, lambda config: self._answer)

    def __exit__(self, *_: object) -> None:
        setattr(self._module, self._name, self._before)


@pytest.mark.parametrize(("name", "arch", "parallel", "training"), CASES, ids=[f"{name}-{layout_name(parallel)}" for name, _, parallel, _ in CASES])
def test_rounded_weights_are_published_from_their_fp32_main_copy(
    pool: Pool, tmp_path: Path, name: str, arch: Architecture, parallel: Parallel, training: Training
) -> None:
    write_random(tmp_path / "source", arch)
    pool.run(publish_spoilt, parallel, arch, tmp_path / "source", tmp_path / "published", training, True, processes=parallel.processes)
    expected = {key: tensor.bfloat16() for key, tensor in read_all(tmp_path / "source", arch).items()}
    found = read_all(tmp_path / "published", arch)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[key]), key


def test_weights_that_are_not_rounded_are_published_themselves(pool: Pool, tmp_path: Path) -> None:
    write_random(tmp_path / "source", LLAMA)
    pool.run(publish_spoilt, DP2, LLAMA, tmp_path / "source", tmp_path / "published", DISTRIBUTED, False, processes=2)
    for key, tensor in read_all(tmp_path / "source", LLAMA).items():
        assert torch.equal(read_all(tmp_path / "published", LLAMA)[key], tensor.bfloat16() * 1.125), key


def resume_spoilt(world: World, source: Path, folder: Path, training: Training) -> bool:
    """Saves, spoils the weights in memory and in the loaded state alike, continues; whether the weights are those of the main copy."""
    student = student_of(world, DP2, LLAMA, source, training)
    right = [parameter.detach().clone() for parameter in student.model.parameters()]
    spoil_weights(student)
    with TrainingCheckpoints(folder, world, keep=1, asynchronous=False) as checkpoints:
        checkpoints.save(Progress(1, 4), student)
    with TrainingCheckpoints(folder, world, keep=1, asynchronous=False) as checkpoints, patched(optimizer, "are_rounded", True):
        checkpoints.load(student)
    return all(torch.equal(now, before) for now, before in zip(student.model.parameters(), right, strict=True))


@pytest.mark.parametrize("training", [DISTRIBUTED, OVERLAPPED], ids=["distributed", "overlapped"])
def test_a_run_that_continues_rounds_its_weights_from_the_main_copy_and_not_from_the_checkpoints_weights(
    pool: Pool, tmp_path: Path, training: Training
) -> None:
    """A checkpoint holds FP8 weights as bf16: rounded once more they would be others."""
    write_random(tmp_path / "source", LLAMA)
    assert all(pool.run(resume_spoilt, tmp_path / "source", tmp_path / "training", training, processes=2))


def test_only_fp8_and_fp4_weights_are_called_rounded() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    assert not fp8_weights.are_rounded(config)
    for name in ("fp8_param", "fp4_param"):
        setattr(config, name, True)
        assert fp8_weights.are_rounded(config)
        setattr(config, name, False)
