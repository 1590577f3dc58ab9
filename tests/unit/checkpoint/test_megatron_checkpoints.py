"""Checkpoints that Megatron-LM and Megatron-Bridge write are read: stacked or one key per layer, fused or plain norm names, padded vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.source import source_architecture
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource
from minitron_megatron.checkpoint.tensors import TensorRow, tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.errors import CheckpointError

PADDED = 192


def packed(folder: Path, arch: Architecture) -> dict[str, Tensor]:
    """Megatron name → tensor; test_tensor_table.py holds the packing against a reference of its own."""
    source = HuggingFaceSource(folder, arch)
    return {row.name: source.read(row) for row in tensor_table(arch)}


def parameter_name(row: TensorRow) -> str:
    """Of megatron's own module: norms are modules of their own, experts a list."""
    if row.expert is not None:
        return row.name.replace("experts.experts.", "experts.local_experts.")
    fused = row.plain_name and row.plain_name.endswith("layer_norm_weight")
    return row.name if fused else row.plain_name or row.name


def write_megatron_lm(folder: Path, tensors: dict[str, Tensor], arch: Architecture, layout: Any, **metadata: Any) -> Path:
    """megatron-core's own model and writer, in Megatron-LM's folder layout, optimizer state beside the model; returns the outer folder."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from minitron_megatron.model.build import build_model
    from minitron_megatron.platform import activate

    [model] = build_model(arch.resized(vocab=PADDED), layout, activate("cpu"), torch.float32).chunks
    plain = {row.name: parameter_name(row) for row in tensor_table(arch)}
    weights = {name: weight.data for name, weight in model.named_parameters()}
    for name, tensor in tensors.items():
        weights[plain[name]][: tensor.shape[0]] = tensor
        weights[plain[name]][tensor.shape[0] :] = 77.0  # padding is never zero in a trained model
    state = model.sharded_state_dict(metadata={**metadata, "dp_cp_group": layout.groups.dp_cp})
    moment = torch.ones(3, 4)
    state["optimizer"] = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight", moment)
    iteration = folder / "iter_0000010"
    iteration.mkdir(parents=True)
    dist_checkpointing.save({"model": state, "iteration": 10, "args": {"num_layers": arch.layers}}, str(iteration))
    (folder / "latest_checkpointed_iteration.txt").write_text("10\n")
    return folder


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Plain tensors under chosen keys, through torch's own writer."""
    import torch.distributed.checkpoint as dcp

    folder.mkdir(parents=True, exist_ok=True)
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def assert_reads(source: MegatronSource, expected: dict[str, Tensor]) -> None:
    for row in tensor_table(source.arch):
        actual = source.read(row)
        assert actual.dtype == expected[row.name].dtype == source.dtype(row)
        assert torch.equal(actual, expected[row.name]), row.name


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "one-key-per-layer"])
def test_what_megatron_lm_writes_is_read_with_equal_tensors(every_family: Path, stacked: bool, tmp_path: Path, layout: Any) -> None:
    arch = source_architecture(str(every_family))
    expected = packed(every_family, arch)
    metadata = {} if stacked else {"non_homogeneous_layers": True}
    folder = write_megatron_lm(tmp_path / "megatron", expected, arch, layout, **metadata)
    source = MegatronSource(folder, arch)
    keys = source._reader.tensors
    matrix = "mlp.experts.experts.linear_fc2.weight" if arch.experts else "mlp.linear_fc2.weight"
    assert (f"decoder.layers.{matrix}" in keys) == stacked  # the reader met the format this test is about
    assert tuple(keys["embedding.word_embeddings.weight"].size) == (PADDED, arch.hidden)
    assert_reads(source, expected)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "one-key-per-layer"])
def test_norms_under_plain_names_are_found(stacked: bool, tiny_hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """A local layer spec without the key map names norms by their own modules."""
    folder = tiny_hf_model("qwen3")
    arch = source_architecture(str(folder))
    expected = packed(folder, arch)
    rows = {row.name: row for row in tensor_table(arch)}
    written = {row.plain_name or row.name: expected[row.name] for row in rows.values()}
    if stacked:
        layers = {name.replace(".layers.0.", ".layers.") for name in written if ".layers.0." in name}
        stacks = {name: torch.stack([written[name.replace(".layers.", f".layers.{i}.")] for i in range(arch.layers)]) for name in layers}
        written = {**{name: tensor for name, tensor in written.items() if ".layers." not in name}, **stacks}
    assert not any(name.endswith("layer_norm_weight") for name in written)
    assert_reads(MegatronSource(save_tensors(tmp_path / "c", written), arch), expected)


def test_a_stacked_checkpoint_goes_through_the_import_like_a_hugging_face_folder(
    tiny_hf_model: Callable[..., Path], tmp_path: Path, layout: Any
) -> None:
    from minitron_megatron.config.source import Model
    from minitron_megatron.convert.import_stage import open_source

    folder = tiny_hf_model("qwen2")
    arch = source_architecture(str(folder))
    expected = packed(folder, arch)
    megatron = write_megatron_lm(tmp_path / "megatron", expected, arch, layout)
    for path in (megatron, megatron / "iter_0000010"):  # the outer folder, or one iteration of it
        source = open_source(Model(path=str(path), hf_config=str(folder / "config.json")), arch)
        assert isinstance(source, MegatronSource)
        assert_reads(source, expected)


@pytest.fixture
def saved(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Architecture, dict[str, Tensor]]:
    """A whole checkpoint of one key per layer, its architecture, and its tensors."""
    folder = tiny_hf_model("llama")
    arch = source_architecture(str(folder))
    tensors = packed(folder, arch)
    return save_tensors(tmp_path / "checkpoint", tensors), arch, tensors


def refused(folder: Path, arch: Architecture) -> str:
    with pytest.raises(CheckpointError) as caught:
        source = MegatronSource(folder, arch)
        for row in tensor_table(arch):
            source.read(row)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_tensor_is_named(saved: Any, tmp_path: Path) -> None:
    _, arch, tensors = saved
    missing = "decoder.layers.1.mlp.linear_fc2.weight"
    folder = save_tensors(tmp_path / "less", {name: tensor for name, tensor in tensors.items() if name != missing})
    assert f"tensor {missing} is missing" in refused(folder, arch)


@pytest.mark.parametrize("foreign", ["decoder.layers.1.self_attention.linear_proj.bias", "decoder.layers.3.mlp.linear_fc2.weight"])
def test_a_tensor_of_the_model_that_the_architecture_does_not_have_is_refused(foreign: str, saved: Any, tmp_path: Path) -> None:
    """A bias or a fourth layer that is left out in silence makes another model."""
    _, arch, tensors = saved
    folder = save_tensors(tmp_path / "more", {**tensors, foreign: torch.ones(3)})
    assert foreign in refused(folder, arch)


def test_more_stacked_layers_than_the_architecture_has_are_refused(saved: Any, tmp_path: Path) -> None:
    _, arch, tensors = saved
    names = [name for name in tensors if ".layers.0." in name]
    stacks = {
        name.replace(".layers.0.", ".layers."): torch.stack([tensors[name.replace(".0.", f".{layer}.")] for layer in range(3)]) for name in names
    }
    whole = {**{name: tensor for name, tensor in tensors.items() if ".layers." not in name}, **stacks}
    folder = save_tensors(tmp_path / "stacked", whole)
    MegatronSource(folder, arch)
    assert "decoder.layers.self_attention" in refused(folder, arch.resized(layers=2))
    assert "decoder.layers.self_attention" in refused(folder, arch.resized(layers=4))


@pytest.mark.parametrize("sizes", [{"vocab": 140}, {"hidden": 48}, {"ffn": 30}, {"heads": 4}, {"layers": 4}])
def test_other_sizes_are_refused(sizes: dict[str, int], saved: Any) -> None:
    folder, arch, _ = saved
    refused(folder, arch.resized(**sizes))


def test_an_output_layer_beside_tied_embeddings_is_refused(saved: Any) -> None:
    from dataclasses import replace

    folder, arch, _ = saved
    assert "output_layer.weight" in refused(folder, replace(arch, tied_embeddings=True))


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(kept: float, saved: Any) -> None:
    folder, arch, _ = saved
    (data,) = folder.glob("*.distcp")
    data.write_bytes(data.read_bytes()[: int(data.stat().st_size * kept)])
    assert "make the checkpoint anew" in refused(folder, arch)


def test_a_file_that_is_gone_is_refused(saved: Any) -> None:
    folder, arch, _ = saved
    next(folder.glob("*.distcp")).unlink()
    assert "cannot be read" in refused(folder, arch)


@pytest.mark.parametrize("content", [None, b"", b"garbage", 0.5])
def test_metadata_that_is_missing_or_broken_is_refused(content: Any, saved: Any) -> None:
    folder, arch, _ = saved
    metadata = folder / ".metadata"
    if content is None:
        metadata.unlink()
    else:
        metadata.write_bytes(metadata.read_bytes()[: int(metadata.stat().st_size * content)] if isinstance(content, float) else content)
    assert str(folder) in refused(folder, arch)


@pytest.mark.parametrize("iteration", ["20", "", "ten"])
def test_an_iteration_that_is_not_there_is_refused(iteration: str, saved: Any) -> None:
    folder, arch, _ = saved
    (folder / "latest_checkpointed_iteration.txt").write_text(iteration)
    assert str(folder) in refused(folder, arch)
