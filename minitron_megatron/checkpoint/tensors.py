"""The table of tensors: Hugging Face name, Megatron name and the axis of each dimension, for import, export and pruning.

Axes: V vocabulary, D hidden, E experts, F ffn, 2F gate rows then up rows (F where there is no gate), HK query heads × channels, K head channels,
QKV fused rows: for each key/value group its queries, its key, its value.
Megatron keeps the experts of a layer in one tensor [E, …]; here each expert is a row of its own, so that streams hold one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.families import ExpertNames


@dataclass(frozen=True)
class TensorRow:
    """One Megatron tensor and the Hugging Face tensors it is packed from."""

    name: str
    hf_names: tuple[str, ...]
    axes: tuple[str, ...]
    layer: int | None = None
    """Global layer number, 0-based."""
    plain_name: str | None = None
    """Where a checkpoint may name it by its own norm module instead of Transformer Engine's fused norm + linear, whose name is `name`."""
    expert: int | None = None
    """Which of the layer's experts; the tensor is then a slice of the checkpoint's `key`, [E, …]."""

    @property
    def key(self) -> str:
        """The checkpoint's key: the name, or the tensor that the layer's experts share."""
        return self.name if self.expert is None else self.name.replace(f".experts.{self.expert}.", ".experts.")

    def prefix(self, arch: Architecture) -> tuple[tuple[int, int], ...]:
        """(place, size) of the dimensions that the checkpoint's tensor has ahead of this one's."""
        return () if self.expert is None else ((self.expert, arch.experts),)

    def shape(self, arch: Architecture) -> tuple[int, ...]:
        """Global shape, the vocabulary not padded."""
        return tuple(axis_size(axis, arch, self.layer) for axis in self.axes)


def axis_size(axis: str, arch: Architecture, layer: int | None = None) -> int:
    """layer: where layers differ in it."""
    ffn = arch.ffn if layer is None else arch.ffn_width(layer)
    return {
        "V": arch.vocab,
        "D": arch.hidden,
        "E": arch.experts,
        "F": ffn,
        "2F": 2 * ffn,
        "HK": arch.heads * arch.head_channels,
        "K": arch.head_channels,
        "QKV": arch.qkv_rows,
    }[axis]


def tensor_table(arch: Architecture) -> list[TensorRow]:
    """Every tensor of a model, in the order of its forward pass."""
    rows = [TensorRow("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("V", "D"))]
    for layer in range(arch.layers):
        rows += _layer_rows(arch, layer)
    rows += [TensorRow(f"decoder.final_layernorm.{part}", (f"model.norm.{part}",), ("D",)) for part in _norm_parts(arch)]
    if not arch.tied_embeddings:
        rows.append(TensorRow("output_layer.weight", ("lm_head.weight",), ("V", "D")))
    return rows


def _layer_rows(arch: Architecture, layer: int) -> list[TensorRow]:
    ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"

    def row(name: str, hf_names: tuple[str, ...], *axes: str, plain: str | None = None) -> TensorRow:
        hf = tuple(f"{theirs}.{part}" for part in hf_names)
        return TensorRow(f"{ours}.{name}", hf, axes, layer, f"{ours}.{plain}" if plain else None)

    attention, qkv = "self_attention.linear_qkv", tuple(f"self_attn.{x}_proj" for x in "qkv")

    def norm(fused: str, plain: str, hf_name: str) -> list[TensorRow]:
        return [row(f"{fused}.layer_norm_{part}", (f"{hf_name}.{part}",), "D", plain=f"{plain}.{part}") for part in _norm_parts(arch)]

    rows = [
        *norm(attention, "input_layernorm", "input_layernorm"),
        row(f"{attention}.weight", tuple(f"{name}.weight" for name in qkv), "QKV", "D"),
    ]
    if arch.family.qkv_bias:
        rows.append(row(f"{attention}.bias", tuple(f"{name}.bias" for name in qkv), "QKV"))
    if arch.family.qk_norm:
        rows.append(row("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), "K"))
        rows.append(row("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), "K"))
    rows += [
        row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "D", "HK"),
    ]
    if arch.family.expert_names:
        return rows + _expert_rows(arch, arch.family.expert_names, layer)
    first = ("mlp.gate_proj.weight", "mlp.up_proj.weight") if arch.family.is_gated else ("mlp.up_proj.weight",)
    rows += [
        *norm("mlp.linear_fc1", "pre_mlp_layernorm", "post_attention_layernorm"),
        row("mlp.linear_fc1.weight", first, "2F" if arch.family.is_gated else "F", "D"),
        row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "D", "F"),
    ]
    return rows


def _norm_parts(arch: Architecture) -> tuple[str, ...]:
    return ("weight",) if arch.family.norm == "rmsnorm" else ("weight", "bias")


def _expert_rows(arch: Architecture, names: ExpertNames, layer: int) -> list[TensorRow]:
    """The norm, the router and the experts; Transformer Engine does not fuse the norm here, so its name is that of its module."""
    ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
    norm, fused = f"{ours}.pre_mlp_layernorm.weight", f"{ours}.mlp.linear_fc1.layer_norm_weight"
    rows = [
        TensorRow(norm, (f"{theirs}.post_attention_layernorm.weight",), ("D",), layer, fused),
        TensorRow(f"{ours}.mlp.router.weight", (f"{theirs}.{names.block}.gate.weight",), ("E", "D"), layer),
    ]
    # all slices of a tensor of the checkpoint in a row: it is written in the table's order
    for matrix, parts, axes in (("linear_fc1", (names.gate, names.up), ("2F", "D")), ("linear_fc2", (names.down,), ("D", "F"))):
        for expert in range(arch.experts):
            hf_names = tuple(f"{theirs}.{names.block}.experts.{expert}.{part}.weight" for part in parts)
            rows.append(TensorRow(f"{ours}.mlp.experts.experts.{expert}.{matrix}.weight", hf_names, axes, layer, expert=expert))
    return rows


def hf_shapes(row: TensorRow, arch: Architecture) -> list[tuple[int, ...]]:
    """Shapes of the Hugging Face tensors that a row is packed from."""
    rest = row.shape(arch)[1:]
    return [(rows, *rest) for rows in _part_rows(row, arch)]


def pack(row: TensorRow, parts: list[Tensor], arch: Architecture) -> Tensor:
    """Hugging Face tensors → the Megatron tensor; values are moved, never changed."""
    if row.axes[0] == "QKV":
        grouped = [part.view(arch.kv_groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unpack(row: TensorRow, tensor: Tensor, arch: Architecture) -> list[Tensor]:
    """The inverse of pack."""
    if row.axes[0] == "QKV":
        per_group = [rows // arch.kv_groups for rows in _part_rows(row, arch)]
        grouped = tensor.view(arch.kv_groups, -1, *tensor.shape[1:]).split(per_group, dim=1)
        return [part.flatten(0, 1) for part in grouped]
    return list(tensor.split(_part_rows(row, arch))) if len(row.hf_names) > 1 else [tensor]


def _part_rows(row: TensorRow, arch: Architecture) -> list[int]:
    queries, keys, rows = arch.heads * arch.head_channels, arch.kv_groups * arch.head_channels, row.shape(arch)[0]
    return {"QKV": [queries, keys, keys], "2F": [rows // 2, rows // 2]}.get(row.axes[0], [rows])
