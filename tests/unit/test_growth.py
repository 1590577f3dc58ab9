"""How work grows with a size, by counting what is done: a clock would need minutes and an idle machine (benchmarks/scaling.py has both)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint import huggingface, regions
from minitron_megatron.checkpoint.slabs import slabs_of
from minitron_megatron.checkpoint.tensors import hf_shapes, tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, write_torch_dist
from minitron_megatron.parallel import split
from minitron_megatron.prune import rank
from minitron_megatron.scores.merge import merge
from minitron_megatron.scores.statistics import Statistics
from minitron_megatron.search.survey import Candidate, Survey

LINEAR = 2.2
"""growth of what is linear is 2, of what is quadratic 4."""


def model(layers: int, **sizes: Any) -> Architecture:
    return Architecture("llama", layers, 4, 2, 1, 2, 6, 11, True, 16, 1e-6, 10000.0).resized(**sizes)


def growth(count: Callable[[int], int], size: int) -> float:
    """How much more a second doubling adds than a first one; a constant part cancels."""
    small, middle, large = (count(size * factor) for factor in (1, 2, 4))
    assert middle > small
    return (large - middle) / (middle - small)


def steps_of(work: Callable[[], Any]) -> int:
    """Bytecode instructions that Python runs for it."""
    steps = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return steps


def test_an_export_adds_up_each_tensor_of_a_shard_once() -> None:
    def export(layers: int) -> int:
        rows = [[slab] for slab in slabs_of(tensor_table(model(layers)), model(layers), lambda row: torch.float32)]
        return steps_of(lambda: huggingface._shards(rows, 1 << 40))

    assert growth(export, 4) < LINEAR


def test_shapes_of_tensors_ask_for_no_list_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    for arch in (model(3), model(3, ffn=[2, 6, 4])):
        expected = [arch.ffn_widths[row.layer] for row in tensor_table(arch) if row.layer is not None and row.axes[-1] == "F"]
        with monkeypatch.context() as patch:
            patch.setattr(Architecture, "ffn_widths", property(lambda arch: pytest.fail("asked for all layers")))
            shapes = [row.shape(arch) for row in tensor_table(arch)]
            assert [shape[-1] for row, shape in zip(tensor_table(arch), shapes, strict=True) if row.axes[-1] == "F"] == expected
            assert all(hf_shapes(row, arch) for row in tensor_table(arch))


def test_each_expert_is_looked_for_among_its_own_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arch = Architecture("mixtral", 2, 8, 2, 1, 4, 6, 11, False, 16, 1e-6, 10000.0, experts=4, experts_per_token=2)
    weights = {row.name: torch.randn(row.shape(arch)) for row in tensor_table(arch)}
    write_torch_dist(tmp_path, tensor_table(arch), arch, dtype=lambda row: torch.float32, read=lambda row: weights[row.name])
    compared: list[int] = []
    find = regions.create_read_items_for_chunk_list

    def spied(key: str, entry: Any, regions: Any) -> Any:
        compared.append(len(entry.chunks))
        return find(key, entry, regions)

    monkeypatch.setattr(regions, "create_read_items_for_chunk_list", spied)
    source = MegatronSource(tmp_path, arch)
    assert all(torch.equal(source.read(row), weights[row.name]) for row in tensor_table(arch))
    assert compared == [1] * len(tensor_table(arch))
    key = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
    whole = torch.stack([weights[key.replace("experts.linear", f"experts.{expert}.linear")] for expert in range(4)])
    assert torch.equal(source._reader.read(key), whole)
    assert torch.equal(source._reader.read(key, (1, 2, 0), (3, 5, 6)), whole[1:, 2:7])


def test_the_widths_of_a_budget_are_counted_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, in_order = 0, rank._in_order

    class Number(int):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return int(self) == other

        __hash__ = int.__hash__

    monkeypatch.setattr(rank, "_in_order", lambda blocks: [(new, score, Number(layer)) for new, score, layer in in_order(blocks)])

    def widths(layers: int) -> int:
        nonlocal compared
        compared = 0
        assert sum(rank.widths_of_budget([torch.arange(1.0, 17)] * layers, 8 * layers, 1)) == 8 * layers
        return compared

    assert growth(widths, 4) < LINEAR


def test_works_of_uneven_layers_are_made_from_one_list_of_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, costs = 0, split.layer_cost

    def counted(arch: Architecture) -> int:
        nonlocal asked
        asked += 1
        return costs(arch)

    monkeypatch.setattr(split, "layer_cost", counted)
    assert len(split.layer_works(model(5, ffn=[2, 6, 4, 4, 3]))) == 5
    assert asked == 1


def test_many_scores_files_are_compared_with_their_neighbours() -> None:
    arch = model(1)

    def file(number: int) -> Statistics:
        part = {"data": "d", "seed": 1, "first_sample": 16 * number, "samples": 16}
        return Statistics(arch, 16, {(0, "ffn"): torch.ones(3, 2, 6)}, {"model": "m", "sequence_length": 8, "precision": "fp32", "parts": [part]})

    def merged(files: int) -> int:
        parts = {f"{number}": file(number) for number in range(files)}
        return steps_of(lambda: merge(parts))

    assert growth(merged, 8) < LINEAR


def test_the_survivors_of_a_survey_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, removed_by = 0, Candidate.removed_by

    def counted(candidate: Candidate) -> str:
        nonlocal asked
        asked += 1
        return removed_by.fget(candidate)

    monkeypatch.setattr(Candidate, "removed_by", property(counted))
    candidates = [Candidate(model(2), model(4), {}, {}) for _ in range(6)]
    found = Survey(model(4), [], candidates, 0)
    assert [found.survivors[place] for place in range(6)] == candidates
    assert asked == 6
