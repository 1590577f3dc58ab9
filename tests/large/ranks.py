"""What one rank of a distillation holds, saves, loads and sends: the product's own code up to the point where numbers would be computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from standing import Stand, stand_in
from torch import Tensor

from minitron_megatron.checkpoint.sharded import model_state
from minitron_megatron.config.distill import Distill, HiddenLoss
from minitron_megatron.data.batches import micro_batches, of_data_rank
from minitron_megatron.distill.exchange import Exchange, StateShape
from minitron_megatron.distill.handover import HandoverStore, Held
from minitron_megatron.distill.hidden.map import hidden_terms, layer_pairs, stage_of
from minitron_megatron.distill.hidden.states import StateCapture
from minitron_megatron.distill.teacher import FINAL, Teacher, Wanted, output_weight
from minitron_megatron.distill.teachers import settle_teacher
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.parallel.layout import Layout, global_layout, teacher_layout
from minitron_megatron.parallel.split import distillation_work
from minitron_megatron.training.optimizer import make_optimizer
from minitron_megatron.training.optimizer_state import OptimizerState
from minitron_megatron.training.output_layer import DistillationOutputLayer

from .cases import Case
from .imagined import META, imagined_world

SETTINGS = Distill(steps=1000)
HIDDEN = HiddenLoss(pairs="last_minus_2", embeddings=True)
ON_CPU = torch.device("cpu")
"""Of the states that are exchanged, which are tiny and real."""


class Shard(NamedTuple):
    """One rank's part of a checkpoint's tensor."""

    key: str
    kind: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    size: tuple[int, ...]
    replica: tuple[int, ...]
    """All zero: the one that is written."""
    may_be_padded: bool


class Owned(NamedTuple):
    """Which of a weight's elements, flat, a data-parallel rank updates."""

    weight: str
    elements: int
    start: int
    stop: int


class Move(NamedTuple):
    """A message of one round of the exchange: rows that are sent, or the place where rows are expected."""

    round: int
    peer: int
    rows: list[float]
    """Empty where they are expected."""
    buffer: int
    first: int
    count: int


@dataclass(frozen=True)
class Arrived:
    """A state as it waits for the student, before the messages are in: zeros where rows are missing."""

    buffer: int
    rows: list[float]
    is_sharded: bool


@dataclass(frozen=True)
class Part:
    """All that one rank says."""

    rank: int
    student: Stand
    teacher: Stand
    teacher_shards: list[Shard]
    student_shards: list[Shard]
    optimizer_shards: list[Shard]
    optimizer_loads_what_it_saves: bool
    owned: list[Owned]
    held: int
    """Elements of the main parameters, and so of each moment, on this rank."""
    misplaced: list[str]
    """Weights whose state a checkpoint would take from another place than it lies at."""
    output_rows: range | None
    """Of the vocabulary, whose rows of the teacher's output weight this rank reads."""
    routes: list[tuple[Any, int, int]]
    sends: list[Move]
    receives: list[Move]
    arrived: dict[tuple[Any, int], Arrived]
    """By the state's name and the number of the micro-batch."""
    left_behind: int
    """States that the teacher made here and nobody took."""
    bytes_sent: int
    bytes_kept: int


def play(case: Case, ranks: Sequence[int]) -> list[Part]:
    """Each of these ranks in turn."""
    return [_part(case, rank) for rank in ranks]


def _part(case: Case, rank: int) -> Part:
    with imagined_world(rank, case.parallel.processes) as world:
        layout = global_layout(case.parallel, world)
        own = teacher_layout(settle_teacher(case.parallel, case.source, case.target, torch.bfloat16, world), world, layout)
        teacher, student = _models(case, own, layout, world.platform)
        wrapped, optimizer = make_optimizer(student.chunks, SETTINGS, case.training)
        weights = model_state(student)
        loads = shards_of(OptimizerState(optimizer, weights, loading=True).tensors())
        saves = shards_of(OptimizerState(optimizer, weights, loading=False).tensors())
        exchange = WatchedExchange(own, layout, dist.new_group(timeout=layout.timeout), ON_CPU)
        states = _exchanged(case, Teacher(teacher, layout, None, exchange, 1e9, world.platform), student)
        return Part(
            rank=rank,
            student=stand_in(layout),
            teacher=stand_in(own),
            teacher_shards=shards_of(model_state(teacher)),
            student_shards=shards_of(weights),
            optimizer_shards=saves,
            optimizer_loads_what_it_saves=loads == saves,
            owned=list(owned_by(wrapped, optimizer)),
            held=sum(main.numel() for inner in optimizer.chained_optimizers for group in inner.optimizer.param_groups for main in group["params"]),
            misplaced=list(misplaced_in(wrapped)),
            output_rows=rows_of_output_weight(case, teacher, layout),
            sends=exchange.sends,
            receives=exchange.receives,
            bytes_sent=exchange.bytes_sent,
            bytes_kept=exchange.bytes_kept,
            **states,
        )


def _models(case: Case, own: Layout, layout: Layout, platform: Any) -> tuple[StageModel, StageModel]:
    """As the stage distill builds them."""
    with META:
        teacher = build_model(case.source, own, platform, torch.bfloat16, output_layer=None)
        student = build_model(
            case.target,
            layout,
            platform,
            torch.bfloat16,
            output_layer=DistillationOutputLayer,
            ends=distillation_work(case.target, case.source),
            trainable=True,
            recompute=case.training.recompute,
        )
    return teacher, student


def shards_of(state: Any) -> list[Shard]:
    """What a sharded state would write."""
    found = []
    for entry in nested_values(state):
        for part in nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]:
            assert isinstance(part, ShardedTensor), f"{part} is no tensor"
            size = (*(1,) * part.prepend_axis_num, *part.local_shape)
            where = tuple(part.global_shape), tuple(part.global_offset), size
            found.append(Shard(part.key, str(part.dtype).removeprefix("torch."), *where, tuple(part.replica_id), part.allow_shape_mismatch))
    return found


def owned_by(wrapped: Sequence[Any], optimizer: Any) -> Iterator[Owned]:
    """By megatron's maps of ranges; everything where the optimizer shares nothing out."""
    [inner] = optimizer.chained_optimizers
    for number, chunk in enumerate(wrapped):
        for name, weight in chunk.module.named_parameters():
            if not chunk.ddp_config.use_distributed_optimizer:
                yield Owned(f"{number}.{name}", weight.numel(), 0, weight.numel())
            elif weight in inner.model_param_gbuf_map:
                part = inner._get_model_param_range_map(weight)["param"]
                yield Owned(f"{number}.{name}", weight.numel(), part.start, part.end)
            else:
                yield Owned(f"{number}.{name}", weight.numel(), 0, 0)


def misplaced_in(wrapped: Sequence[Any]) -> Iterator[str]:
    """megatron joins a buffer's buckets, each of the length that it calls unpadded, and then looks for a weight at its place in the buffer."""
    for number, chunk in enumerate(wrapped):
        names = {weight: name for name, weight in chunk.module.named_parameters()}
        for buffer in chunk.buffers:
            joined = [0, *accumulate(bucket.numel_unpadded for bucket in buffer.buckets)]
            for weight, (start, _, bucket) in buffer.param_index_map.items():
                if joined[bucket] + start - buffer.buckets[bucket].offset != start:
                    yield f"{number}.{names[weight]}"


def rows_of_output_weight(case: Case, teacher: StageModel, layout: Layout) -> range | None:
    """What the product's own reading of the teacher's output weight asks a checkpoint for."""
    if not layout.is_last_stage:
        return None
    asked: list[range] = []

    def read(row: Any, rows: range) -> Tensor:
        asked.append(rows)
        return torch.empty(len(rows), case.source.hidden, dtype=torch.bfloat16, device=META)

    source: Any = SimpleNamespace(arch=case.source, read=read)
    weight = output_weight(source, teacher, layout, torch.bfloat16)
    if not asked:  # shared with the embedding, or padding alone
        first = teacher.chunks[0]
        assert case.source.tied_embeddings and weight is first.embedding.word_embeddings.weight
        return range(first.first_row(), first.first_row() + first.valid_rows())
    return asked[0]


class WatchedExchange(Exchange):
    """Writes down what it would send and wait for; what is expected is filled in later, from what others say that they send."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._rounds = 0
        self.sends: list[Move] = []
        self.receives: list[Move] = []

    def _start(self, moves: list[dist.P2POp]) -> None:
        for move in moves:
            rows, buffer = move.tensor[:, 0, 0].tolist(), move.tensor.untyped_storage().data_ptr()
            if move.op is dist.isend:
                self.sends.append(Move(self._rounds, move.peer, rows, 0, 0, len(rows)))
            else:
                first = move.tensor.storage_offset() // move.tensor.stride(0)
                self.receives.append(Move(self._rounds, move.peer, [], buffer, first, len(rows)))
        self._rounds += 1


def value_of(state: int, number: int, row: int, case: Case) -> float:
    """What a row of a state of a micro-batch holds: nothing else holds it, and it is not 0. state: its place among the routes."""
    return float((state * case.micro_batches + number) * case.sequence + row + 1)


def wanted_states(case: Case, student: StageModel) -> list[Wanted]:
    """The final states, an inner layer's and the embeddings, as a distillation with hidden-state losses asks for them."""
    split = student.layers_per_stage()
    terms = hidden_terms(HIDDEN, layer_pairs(HIDDEN, case.source.layers, case.target.layers, []))
    return [Wanted(FINAL, len(split) - 1), *dict.fromkeys(Wanted(term.teacher, stage_of(term.student, split)) for term in terms)]


def _exchanged(case: Case, teacher: Teacher, student: StageModel) -> dict[str, Any]:
    """Fills in for the teacher's schedule: what arises on this rank is made, whole or its part of the sequence, and handed over."""
    layout, wanted = teacher.model.layout, wanted_states(case, student)
    groups = micro_batches(0, global_batch=case.micro_batches, micro_batch=1)
    here = set(StateCapture(teacher.model.chunks, [item.state for item in wanted]).names) | ({FINAL} if layout.is_last_stage else set())
    made, arrived = (HandoverStore(1e12, ON_CPU) for _ in range(2))
    width = case.sequence // layout.tensor if layout.sequence_parallel else case.sequence
    first = width * layout.tensor_rank if layout.sequence_parallel else 0
    for (number,) in of_data_rank(groups, layout.data_rank, layout.data):
        for state, item in enumerate(wanted):
            if item.state in here:
                rows = [value_of(state, number, row, case) for row in range(first, first + width)]
                made.put((item, (number,)), Held(torch.tensor(rows).view(-1, 1, 1), layout.sequence_parallel))
    routes = [teacher._route(item) for item in wanted]
    teacher.exchange.run(routes, groups, made, arrived, StateShape(case.sequence, 1, 1, torch.float32))
    keys = [(item, ids) for item in wanted for ids in groups]
    return {
        "routes": [(route.name, route.source_stage, route.target_stage) for route in routes],
        "arrived": {(item, ids[0]): _as_it_is(arrived.take((item, ids))) for item, ids in keys if (item, ids) in arrived},
        "left_behind": sum(key in made for key in keys),
    }


def _as_it_is(held: Held) -> Arrived:
    return Arrived(held.states.untyped_storage().data_ptr(), held.states[:, 0, 0].tolist(), held.sharded)
