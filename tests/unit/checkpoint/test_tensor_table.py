"""The table of tensors: it names everything, and packing is what the layout of grouped-query attention says it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minitron_megatron.arch.architecture import parameter_count
from minitron_megatron.arch.source import source_architecture
from minitron_megatron.checkpoint.tensors import hf_shapes, pack, tensor_table, unpack


def test_the_table_names_every_tensor_of_the_folder_with_its_shape(every_family: Path, hf_tensors: Callable[[Path], dict[str, Tensor]]) -> None:
    arch = source_architecture(str(every_family))
    named = {name: shape for row in tensor_table(arch) for name, shape in zip(row.hf_names, hf_shapes(row, arch), strict=True)}
    assert named == {name: tuple(tensor.shape) for name, tensor in hf_tensors(every_family).items()}
    assert sum(torch.Size(row.shape(arch)).numel() for row in tensor_table(arch)) == parameter_count(arch)


def test_names_of_rows_are_those_of_megatrons_own_model(every_family: Path, layout: object) -> None:
    """The keys of the sharded state that megatron-core would save, shapes included."""
    from minitron_megatron.checkpoint.sharded import chunk_state
    from minitron_megatron.model.build import build_model
    from minitron_megatron.platform import activate

    arch = source_architecture(str(every_family))
    [chunk] = build_model(arch, layout, activate("cpu"), torch.float32).chunks  # type: ignore[arg-type]
    state = chunk_state(chunk)
    shapes = {entry.key: tuple(entry.global_shape) for name, entry in state.items() if not hasattr(entry, "build_fn")}
    fused = {entry.key: tuple(entry.data.shape) for entry in state.values() if hasattr(entry, "build_fn")}  # one process: local is global
    if arch.experts:  # entries of one expert each, in one process of all of them
        fused = {key: (arch.experts, *shape[-2:]) if ".experts." in key else shape for key, shape in fused.items()}
    table = {row.key: (*(size for _, size in row.prefix(arch)), *row.shape(arch)) for row in tensor_table(arch)}
    assert table == {**shapes, **fused}


def test_unpack_is_the_inverse_of_pack(every_family: Path, hf_tensors: Callable[[Path], dict[str, Tensor]]) -> None:
    arch, tensors = source_architecture(str(every_family)), hf_tensors(every_family)
    for row in tensor_table(arch):
        parts = [tensors[name] for name in row.hf_names]
        packed = pack(row, parts, arch)
        assert tuple(packed.shape) == row.shape(arch)
        for part, back in zip(parts, unpack(row, packed, arch), strict=True):
            assert torch.equal(part, back)


def test_fused_rows_are_each_groups_queries_then_its_key_then_its_value(tiny_hf_model: Callable[..., Path]) -> None:
    """4 heads in each of 2 groups, row by row; the other order (all queries, all keys, all values) is another model."""
    arch = source_architecture(str(tiny_hf_model("qwen2")))
    rows = [row for row in tensor_table(arch) if row.layer == 1 and row.axes[0] == "QKV"]
    assert [row.axes for row in rows] == [("QKV", "D"), ("QKV",)]
    width = arch.head_channels
    for row in rows:
        columns = (arch.hidden,) if len(row.axes) == 2 else ()
        q, k, v = (torch.randn(heads * width, *columns) for heads in (8, 2, 2))
        expected: list[Tensor] = []
        for group in range(2):
            for head in range(4):
                start = (group * 4 + head) * width
                expected += [q[start + channel] for channel in range(width)]
            expected += [k[group * width + channel] for channel in range(width)]
            expected += [v[group * width + channel] for channel in range(width)]
        assert torch.equal(pack(row, [q, k, v], arch), torch.stack(expected))


def test_gate_rows_come_before_up_rows(tiny_hf_model: Callable[..., Path]) -> None:
    arch = source_architecture(str(tiny_hf_model("llama")))
    row = next(row for row in tensor_table(arch) if row.axes[0] == "2F")
    gate, up = torch.zeros(arch.ffn, arch.hidden), torch.ones(arch.ffn, arch.hidden)
    assert row.hf_names[0].endswith("gate_proj.weight")
    assert pack(row, [gate, up], arch)[:, 0].tolist() == [0.0] * arch.ffn + [1.0] * arch.ffn
