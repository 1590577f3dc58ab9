"""Every rank of layouts of up to 1,024 ranks, each built in turn on the meta device: together they hold, save, load and send everything once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from standing import counted_by_hand
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.checkpoint.save_stream import _LazyPlanner
from minitron_megatron.checkpoint.slabs import slabs_of
from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.checkpoint.torch_dist import shares
from minitron_megatron.config.checks.layout import layout_problems
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.prune.plan import PrunePlan, make_plan
from minitron_megatron.prune.slice import kept_indices
from minitron_megatron.prune.stream import source_rows
from minitron_megatron.scores.units import random_scores

from .cases import LARGE, LLAMA_8B, SMALL, Case, own
from .conftest import Play
from .delivery import delivery_faults, state_faults
from .ranks import Part
from .sharding import Whole, faults, ownership_faults, tiling_faults

CASES = {**SMALL, **LARGE}
MOMENTS = ("exp_avg", "exp_avg_sq", "fp32_param")
CUT = {"V", "F", "2F", "HK", "QKV"}
"""Axes that tensor parallelism cuts."""


@pytest.fixture(scope="module", params=[*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def parts(case: Case, played: Play) -> list[Part]:
    """What every rank says."""
    return played(case)


# --- who stands where ---------------------------------------------------------------------------------------------------------------


def teacher_sizes(case: Case) -> tuple[int, int, int]:
    """Tensor, data, pipeline."""
    parallel, own = case.parallel, case.parallel.teacher
    tensor, pipeline = (parallel.tensor, parallel.pipeline) if isinstance(own, str) else (own.tensor, own.pipeline)
    return tensor, parallel.processes // (tensor * pipeline), pipeline


def test_every_rank_stands_where_both_layouts_have_a_place_for_it(case: Case, parts: list[Part]) -> None:
    parallel = case.parallel
    assert [part.rank for part in parts] == list(range(parallel.processes))
    assert [part.student for part in parts] == [
        counted_by_hand(rank, parallel.tensor, parallel.data, parallel.pipeline) for rank in range(len(parts))
    ]
    assert [part.teacher for part in parts] == [counted_by_hand(rank, *teacher_sizes(case)) for rank in range(len(parts))]


# --- shards of weights and of the optimizer's state ---------------------------------------------------------------------------------


def wholes(arch: Architecture, tensor: int, data: int, *, ends: int = 1, has_output: bool = True) -> dict[str, Whole]:
    """The model's tensors by the table of tensors. ends: pipeline stages that hold the embedding."""
    found = {}
    for row in tensor_table(arch):
        if row.name == "output_layer.weight" and not has_output:
            continue
        shape = tuple(-(-size // tensor) * tensor if axis == "V" else size for axis, size in zip(row.axes, row.shape(arch), strict=True))
        whole_on_each = 1 if CUT & set(row.axes) else tensor
        found[row.name] = Whole("bfloat16", shape, data * whole_on_each * (ends if row.axes == ("V", "D") else 1))
    return found


def student_wholes(case: Case) -> dict[str, Whole]:
    parallel = case.parallel
    ends = 2 if case.target.tied_embeddings and parallel.pipeline > 1 else 1
    return wholes(case.target, parallel.tensor, parallel.data, ends=ends)


def test_the_table_of_tensors_has_all_parameters(case: Case) -> None:
    """The reference of the next tests, against the closed form that is held against published counts."""
    for arch in (case.source, case.target):
        assert sum(torch.Size(whole.shape).numel() for whole in wholes(arch, 1, 1).values()) == parameter_count(arch)


def test_shards_of_teacher_and_student_make_up_their_checkpoints(case: Case, parts: list[Part]) -> None:
    tensor, data, _ = teacher_sizes(case)
    teacher = wholes(case.source, tensor, data, has_output=False)  # read apart from the model
    assert faults((shard for part in parts for shard in part.teacher_shards), teacher) == []
    assert faults((shard for part in parts for shard in part.student_shards), student_wholes(case)) == []


def test_only_vocabularies_may_be_padded(case: Case, parts: list[Part]) -> None:
    """Elsewhere megatron would take a checkpoint of another shape for this one."""
    for part in parts:
        for shard in (*part.teacher_shards, *part.student_shards):
            assert shard.may_be_padded == (shard.key in ("embedding.word_embeddings.weight", "output_layer.weight")), shard


def test_shards_of_the_optimizers_state_make_up_the_training_checkpoint(case: Case, parts: list[Part]) -> None:
    """Whichever rank updates an element, the checkpoint has it under its weight's name, once."""
    state = {f"optimizer.state.{moment}.{key}": whole._replace(kind="float32") for key, whole in student_wholes(case).items() for moment in MOMENTS}
    assert faults((shard for part in parts for shard in part.optimizer_shards), state) == []
    assert all(part.optimizer_loads_what_it_saves for part in parts)


def data_groups(parts: list[Part]) -> Iterator[list[Part]]:
    """Ranks that train on different samples with the same weights, in the order of their data-parallel ranks."""
    groups: dict[tuple[int, int], list[Part]] = defaultdict(list)
    for part in parts:
        groups[part.student.place.tensor, part.student.place.stage].append(part)
    for group in groups.values():
        yield sorted(group, key=lambda part: part.student.place.data)


def test_data_parallel_ranks_share_every_weight_out_among_themselves(case: Case, parts: list[Part]) -> None:
    shared_out = case.training.distributed_optimizer and case.parallel.data > 1
    for group in data_groups(parts):
        owned = [part.owned for part in group]
        assert ownership_faults(owned if shared_out else owned[:1]) == []
        assert [part.held for part in group] == [sum(item.stop - item.start for item in part.owned) for part in group]
        if shared_out:  # nobody has much more than a fair share; what is behind a bucket's end is nobody's
            fair = sum(item.elements for item in owned[0]) / len(group)
            assert max(part.held for part in group) <= 1.01 * fair


def test_a_weights_state_is_saved_from_where_it_lies(parts: list[Part]) -> None:
    assert [name for part in parts for name in part.misplaced] == []


# --- the pruned checkpoint ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(case: Case) -> PrunePlan:
    return make_plan(random_scores(case.source, seed=1), case.source, case.target)


def test_what_the_plan_keeps_of_every_tensor_has_the_students_shape(case: Case, plan: PrunePlan) -> None:
    origin = source_rows(plan)
    for row in tensor_table(case.target):
        old = origin[row.name]
        kept = [kept_indices(axis, old, plan) for axis in old.axes]
        sizes = [size if indices is None else len(indices) for size, indices in zip(old.shape(case.source), kept, strict=True)]
        assert tuple(sizes) == row.shape(case.target), row.name
        assert all(indices is None or int(indices.max()) < size for indices, size in zip(kept, old.shape(case.source), strict=True)), row.name


def metadata_of_stream(arch: Architecture, processes: int) -> dict[str, TensorStorageMetadata]:
    """Of the checkpoint that this many processes write together, by the product's planner and torch's own check of all plans."""
    rows = tensor_table(arch)
    plans, planners = [], []
    for mine in shares([(row, torch.Size(row.shape(arch)).numel() * 2) for row in rows], processes):
        slabs = list(slabs_of(mine, arch, lambda row: torch.bfloat16))
        planner = _LazyPlanner(slabs, refuse_to_read, {row.name: (row.key, row.prefix(arch)) for row in mine})
        planner.set_up_planner({row.name: whole_of(row, arch) for row in mine}, is_coordinator=not planners)
        planners.append(planner)
        plans.append(planner.create_local_plan())
    _, metadata = planners[0].create_global_plan(plans)
    return metadata.state_dict_metadata


def whole_of(row: TensorRow, arch: Architecture) -> torch.Tensor:
    return torch.empty(row.shape(arch), dtype=torch.bfloat16, device="meta")


def refuse_to_read() -> torch.Tensor:
    raise AssertionError("no data is asked for")


def test_the_pruned_checkpoint_has_what_every_rank_of_the_student_asks_for(case: Case, parts: list[Part]) -> None:
    """Written by as many processes as train: its chunks tile every tensor, and a rank's part lies within, but for rows of padding."""
    written = metadata_of_stream(case.target, case.parallel.processes)
    assert written.keys() == student_wholes(case).keys()
    for key, entry in written.items():
        assert tiling_faults([(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks], tuple(entry.size)) == [], key
    for part in parts:
        for shard in part.student_shards:
            stored = tuple(written[shard.key].size)
            assert stored == shard.shape or (shard.may_be_padded and stored == (case.target.vocab, *shard.shape[1:]))
            assert all(begin < size for begin, size in zip(shard.offset, stored, strict=True)), shard


def test_the_teachers_output_weight_is_read_once_by_the_students_last_stage(case: Case, parts: list[Part]) -> None:
    for group in data_groups(parts):
        stage = group[0].student.place.stage
        assert all((part.output_rows is not None) == (stage == case.parallel.pipeline - 1) for part in group)
    last = [part for part in parts if part.output_rows is not None]
    for number in range(case.parallel.data):
        rows = [row for part in last if part.student.place.data == number for row in part.output_rows or ()]
        assert rows == list(range(case.source.vocab))


# --- the exchange -------------------------------------------------------------------------------------------------------------------


def test_every_state_of_the_teacher_arrives_once_where_the_student_wants_it(case: Case, parts: list[Part]) -> None:
    assert all(part.routes == parts[0].routes for part in parts)
    unmatched, lie = delivery_faults(parts)
    assert unmatched == []
    assert state_faults(case, parts, lie) == []
    assert [part.rank for part in parts if part.left_behind] == []
    # what travels and what stays is together each state once, of four bytes a row
    moved = sum(part.bytes_sent + part.bytes_kept for part in parts)
    assert moved == 4 * case.sequence * case.micro_batches * len(parts[0].routes)


# --- what is refused, and whether the checks see anything -----------------------------------------------------------------------------


def test_more_tensor_ranks_than_key_value_groups_are_refused() -> None:
    [problem] = layout_problems(Parallel(tensor=16, data=64), LLAMA_8B, "the source model")
    assert problem == (
        "parallel.tensor=16 does not divide the source model's 8 key/value groups (a group belongs to one rank); tensor sizes that do: 1, 2, 4, 8"
    )


@pytest.fixture(scope="module")
def some(played: Play) -> tuple[Case, list[Part]]:
    """Four layers on eight ranks, to be broken."""
    arch = LLAMA_8B.resized(layers=4)
    parallel = Parallel(tensor=2, pipeline=2, data=2, sequence=True, teacher=own(1, 2, sequence=False))
    case = Case(arch, arch.resized(hidden=3072, ffn=9216), parallel)
    return case, played(case)


def broken(parts: list[Part], rank: int, **changes: Any) -> list[Part]:
    return [replace(part, **changes) if part.rank == rank else part for part in parts]


def test_a_shard_that_is_lost_doubled_moved_or_of_another_size_is_found(some: tuple[Case, list[Part]]) -> None:
    case, parts = some
    expected, shards = student_wholes(case), parts[1].student_shards

    def found(changed: list[Any]) -> list[str]:
        return faults((shard for part in broken(parts, 1, student_shards=changed) for shard in part.student_shards), expected)

    assert found(shards) == []
    for place, shard in enumerate(shards):
        if shard.replica != (0, 0, 0) or shard.offset == (0,):
            continue
        others = shards[:place] + shards[place + 1 :]
        moved, shorter = tuple(0 for _ in shard.offset), (shard.size[0] - 1, *shard.size[1:])
        assert any("elements" in fault for fault in found(others))
        assert any("written 2 times" in fault for fault in found([*shards, shard]))
        assert found([*others, shard._replace(offset=moved)]) or moved == shard.offset
        assert any("elements" in fault for fault in found([*others, shard._replace(size=shorter)]))
        assert any("not written" in fault for fault in found([*others, shard._replace(replica=(0, 0, 7))]))
        assert any("unknown" in fault for fault in found([*others, shard._replace(key="decoder.layers.2.x")]))


def test_an_element_that_two_ranks_update_or_none_is_found(some: tuple[Case, list[Part]]) -> None:
    _, parts = some
    one, two = (part.owned for part in next(data_groups(parts)))
    assert ownership_faults([one, two]) == []
    cut = next(number for number, part in enumerate(one) if 0 < part.stop - part.start < part.elements)
    for begin, end in ((0, -1), (0, 1), (-1, 0), (1, 0)):
        if one[cut].start + begin >= 0:
            changed = [*one[:cut], one[cut]._replace(start=one[cut].start + begin, stop=one[cut].stop + end), *one[cut + 1 :]]
            assert len(ownership_faults([changed, two])) == 1


def test_a_message_that_is_lost_swapped_doubled_or_sent_elsewhere_is_found(some: tuple[Case, list[Part]]) -> None:
    case, parts = some
    giver = next(part for part in parts if len({move.rows[0] for move in part.sends}) > 1)
    first, second = giver.sends[0], next(move for move in giver.sends if move.rows != giver.sends[0].rows)
    others = [move for move in giver.sends if move not in (first, second)]
    elsewhere = first._replace(peer=(first.peer + 1) % len(parts))

    def found(sends: list[Any]) -> bool:
        unmatched, lie = delivery_faults(broken(parts, giver.rank, sends=sends))
        return bool(unmatched or state_faults(case, parts, lie))

    assert not found(giver.sends)
    assert found([second, *others])
    assert found([first._replace(rows=second.rows), second._replace(rows=first.rows), *others])
    assert found([first, first, second, *others])
    assert found([elsewhere, second, *others])
    assert found([first._replace(round=first.round + 1), second, *others])
    taker, place = next((part, part.receives[0]) for part in parts if part.receives)
    assert delivery_faults(broken(parts, taker.rank, receives=[*taker.receives, place]))[0]
