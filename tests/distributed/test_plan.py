"""What `minitron plan` counts of weights, gradients and optimizer state, against what every rank of a real model holds: to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kept import kept_bytes
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.distill import Training
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.data.batches import collate
from minitron_megatron.model.build import build_model
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.split import distillation_work
from minitron_megatron.parallel.world import World
from minitron_megatron.plan.activations import Pass, kept_by_chunk
from minitron_megatron.plan.buffers import trained_bytes
from minitron_megatron.plan.split import split_of
from minitron_megatron.plan.weights import chunk_weights, elements
from minitron_megatron.training.output_layer import DistillationOutputLayer
from minitron_megatron.training.student import make_student

from .first_step import settings
from .pool import Pool
from .tiny import (
    CP2,
    DP2,
    EP2_OF_DP4,
    LLAMA,
    MIXTRAL,
    NEMOTRON_TIED,
    PP2_EVEN,
    PP2_VPP2,
    QWEN2_TIED,
    QWEN3,
    TP2_PP2,
    TP2_SP,
    UNEVEN,
    RandomSamples,
    name_of,
    teacher_of,
)

OVERLAPPED, PLAIN, SHARED_OUT = Training(overlap_grad_reduce=True), Training(distributed_optimizer=False), Training()
# odd vocabularies and layers, tied weights on one and on two stages, widths that differ, biases, experts that are shared out
CASES = [
    (LLAMA, TP2_SP, SHARED_OUT, "bf16"),
    (QWEN2_TIED, TP2_PP2, SHARED_OUT, "fp32"),
    (UNEVEN, PP2_VPP2, PLAIN, "bf16"),
    (QWEN3, PP2_EVEN, SHARED_OUT, "fp32"),
    (NEMOTRON_TIED, DP2, SHARED_OUT, "bf16"),
    (LLAMA, DP2, PLAIN, "bf16"),
    (QWEN2_TIED, Parallel(pipeline=2, data=2), OVERLAPPED, "bf16"),
    (LLAMA, Parallel(data=3), OVERLAPPED, "fp32"),
    (MIXTRAL, EP2_OF_DP4, SHARED_OUT, "bf16"),
    (LLAMA, CP2, PLAIN, "bf16"),
    (QWEN2_TIED, Parallel(context=2, data=2), OVERLAPPED, "bf16"),
]
IDS = [f"{arch.family_name}-{name_of(parallel)}-{precision}-{number}" for number, (arch, parallel, _, precision) in enumerate(CASES)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def held(world: World, arch: Architecture, parallel: Parallel, training: Training, precision: str) -> dict[str, Any]:
    """Bytes of this rank after the optimizer's first step, and of a frozen model without an output layer."""
    layout = global_layout(parallel, world)
    teacher = teacher_of(arch)
    ends, output = distillation_work(arch, teacher), DistillationOutputLayer
    model = build_model(arch, layout, world.platform, DTYPES[precision], output_layer=output, ends=ends, trainable=True)
    frozen = build_model(arch, layout, world.platform, DTYPES[precision], output_layer=None, ends=ends)
    student = make_student(model, settings(micro_batch=1, global_batch=4), training)
    student.optimizer.step()
    state = [value for inner in student.optimizer.chained_optimizers for one in inner.optimizer.state.values() for value in one.values()]
    weights = list(model.parameters())
    mains = [main for weight in weights if isinstance(main := getattr(weight, "main_param", None), Tensor)]
    buffers = [buffer for chunk in student.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    return {
        "place": layout.place,
        "weights": storages(weights),
        "gradients": storages([buffer.grad_data for buffer in buffers]),
        "optimizer": storages([*state, *mains]),
        "elements": sum(weight.numel() for weight in weights),
        "frozen": sum(weight.numel() for weight in frozen.parameters()),
    }


def kept_and_counted(world: World, sequence: int, precision: str) -> tuple[int, int]:
    """Bytes that a pass over this rank's part of a sequence keeps, and those of the closed form."""
    parallel, ends = Parallel(context=world.size), distillation_work(LLAMA, LLAMA)
    layout, output = global_layout(parallel, world), DistillationOutputLayer
    model = build_model(LLAMA, layout, world.platform, DTYPES[precision], output_layer=output, ends=ends, trainable=True)
    split = split_of(LLAMA, parallel, ends)
    run = Pass(split, 2, sequence, DTYPES[precision].itemsize, "none", "cpu")
    return kept_bytes(model.train().last, 2, sequence // world.size), kept_by_chunk(run, split.chunks(0)[0])


@pytest.mark.parametrize(("ranks", "sequence", "precision"), [(2, 64, "bf16"), (2, 800, "fp32"), (3, 96, "fp32")])
def test_ranks_that_share_a_sequence_keep_the_bytes_that_are_counted(pool: Pool, ranks: int, sequence: int, precision: str) -> None:
    """Keys and values of the whole sequence among them, and masks, which grow with its square."""
    for kept, counted in pool.run(kept_and_counted, sequence, precision, processes=ranks):
        assert counted == pytest.approx(kept, rel=0.02)  # as without context ranks: some numbers do not grow with the tokens


def storages(tensors: list[Tensor]) -> int:
    """Bytes; storages that tensors share are counted once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize(("arch", "parallel", "training", "precision"), CASES, ids=IDS)
def test_every_rank_holds_the_bytes_that_are_counted(pool: Pool, arch: Architecture, parallel: Parallel, training: Training, precision: str) -> None:
    split = split_of(arch, parallel, distillation_work(arch, teacher_of(arch)))
    for rank in pool.run(held, arch, parallel, training, precision, processes=parallel.processes):
        place = rank["place"]
        chunks = [chunk_weights(split, chunk) for chunk in split.chunks(place.stage)]
        replica = place.context + parallel.context * place.data
        found = trained_bytes(split, chunks, training, stage=place.stage, data_rank=replica, width=DTYPES[precision].itemsize)
        assert found._asdict() == {name: rank[name] for name in found._fields}, place
        assert sum(map(elements, chunks)) == rank["elements"]
        assert sum(elements(chunk_weights(split, chunk, output=False)) for chunk in split.chunks(place.stage)) == rank["frozen"]


def test_the_loaded_samples_are_of_the_bytes_that_are_counted() -> None:
    from minitron_megatron.plan.memory import BATCH_BYTES

    batch = collate(RandomSamples(2), (0, 1))
    told = sum(x.nbytes for x in (batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, batch.position_ids_BS))
    assert told == BATCH_BYTES * batch.tokens_BS.numel()
