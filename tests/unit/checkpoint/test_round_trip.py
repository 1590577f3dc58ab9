"""Hugging Face → torch_dist → Hugging Face changes no bit, and the imported model computes what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.source import source_architecture
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource, write_huggingface
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, TorchDistReader, weights_digest, write_torch_dist

Tensors = Callable[[Path], dict[str, Tensor]]
Import = Callable[[Path, Path], Architecture]


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name  # bits: −0 and NaN too


@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000], ids=["single", "sharded"])
def test_there_and_back_is_bit_identical(every_family: Path, shard_bytes: int, tmp_path: Path, hf_tensors: Tensors, import_model: Import) -> None:
    arch = import_model(every_family, tmp_path / "checkpoint")
    back = tmp_path / "back"
    back.mkdir()
    total = write_huggingface(back, MegatronSource(tmp_path / "checkpoint", arch), arch, shard_bytes=shard_bytes)
    expected = hf_tensors(every_family)
    assert_same_bits(hf_tensors(back), expected)
    assert total == sum(tensor.nbytes for tensor in expected.values())
    files = sorted(path.name for path in back.iterdir())
    if shard_bytes > total:
        assert files == ["model.safetensors"]
        return
    assert len(files) > 3
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == expected.keys()
    assert {*index["weight_map"].values(), "model.safetensors.index.json"} == set(files)
    # a shard holds more than shard_bytes only where one tensor alone does
    largest = max(torch.Size(row.shape(arch)).numel() * 4 for row in tensor_table(arch))
    assert all((back / file).stat().st_size < max(shard_bytes, largest) + 10_000 for file in files)


def test_transformers_loads_the_sharded_export_without_a_word(tiny_hf_model: Callable[..., Path], tmp_path: Path, import_model: Import) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_hf_model("qwen2")
    arch = import_model(source, tmp_path / "checkpoint")
    write_huggingface(tmp_path, MegatronSource(tmp_path / "checkpoint", arch), arch, shard_bytes=20_000)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = AutoModelForCausalLM.from_pretrained(source)
    for (name, ours), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_sharded_source_is_the_same_as_a_single_file(tiny_hf_model: Callable[..., Path], tmp_path: Path, import_model: Import) -> None:
    source = tiny_hf_model("llama")
    arch = import_model(source, tmp_path / "checkpoint")
    megatron = MegatronSource(tmp_path / "checkpoint", arch)
    (tmp_path / "sharded").mkdir()
    write_huggingface(tmp_path / "sharded", megatron, arch, shard_bytes=20_000)
    sharded = HuggingFaceSource(tmp_path / "sharded", arch)
    for row in tensor_table(arch):
        assert torch.equal(sharded.read(row), megatron.read(row))


def test_bf16_and_mixed_types_keep_their_types_and_bits(
    tiny_hf_model: Callable[..., Path], tmp_path: Path, hf_tensors: Tensors, import_model: Import
) -> None:
    """Norms in fp32 beside bf16 matrices occur; −0 and the largest numbers too."""
    source, mixed = tiny_hf_model("qwen3"), tmp_path / "mixed"
    mixed.mkdir()
    tensors = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in hf_tensors(source).items()}
    tensors["model.embed_tokens.weight"][:3, 0] = torch.tensor([-0.0, 3.3e38, 1e-40])
    save_file(tensors, mixed / "model.safetensors")
    (mixed / "config.json").write_bytes((source / "config.json").read_bytes())
    arch, back = import_model(mixed, tmp_path / "checkpoint"), tmp_path / "back"
    back.mkdir()
    write_huggingface(back, MegatronSource(tmp_path / "checkpoint", arch), arch)
    assert_same_bits(hf_tensors(back), tensors)


def test_the_digest_is_that_of_the_bits(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> None:
    arch = source_architecture(str(tiny_hf_model("llama")))
    reader = HuggingFaceSource(tiny_hf_model("llama"), arch)
    rows = tensor_table(arch)
    first = write_torch_dist(tmp_path / "a", rows, arch, dtype=reader.dtype, read=reader.read)
    assert weights_digest(MegatronSource(tmp_path / "a", arch)) == first

    def one_bit_off(row: Any) -> Tensor:
        tensor = reader.read(row).clone()
        if row.name == rows[-1].name:
            tensor.view(-1).view(torch.int32)[-1] ^= 1
        return tensor

    assert write_torch_dist(tmp_path / "b", rows, arch, dtype=reader.dtype, read=one_bit_off) != first


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_tensors_are_read_once_each_in_the_order_of_the_table(family: str, tiny_hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """A stream: the memory it needs is that of one tensor, of one expert where a tensor on disk holds all of a layer."""
    arch = source_architecture(str(tiny_hf_model(family)))
    reader, seen = HuggingFaceSource(tiny_hf_model(family), arch), []

    def read(row: Any) -> Tensor:
        seen.append(row.name)
        return reader.read(row)

    write_torch_dist(tmp_path / "a", tensor_table(arch), arch, dtype=reader.dtype, read=read)
    assert seen == [row.name for row in tensor_table(arch)]
    tensors = TorchDistReader(tmp_path / "a").tensors
    pieces = {row.key: tuple(tensors[row.key].chunks[row.expert].sizes) for row in tensor_table(arch) if row.expert is not None}
    matrices = {"linear_fc1": (1, 2 * arch.ffn, arch.hidden), "linear_fc2": (1, arch.hidden, arch.ffn)}
    assert all(sizes == matrices[key.split(".")[-2]] for key, sizes in pieces.items())
    assert bool(pieces) == bool(arch.experts)


@torch.no_grad()
def logits_of_ours(model: Any, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden_SBD = model.last(tokens, positions, None)
    return (hidden_SBD @ model.output_weight()[: model.valid_rows()].t()).transpose(0, 1)


def test_imported_models_compute_what_transformers_computes(
    every_family: Path, tmp_path: Path, import_model: Import, load_imported: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM

    arch = import_model(every_family, tmp_path / "checkpoint")
    # 300 positions: the slow channels of the rotary embedding have turned far enough to count
    tokens = torch.randint(arch.vocab, (2, 300), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(every_family)(tokens).logits
    actual = logits_of_ours(load_imported(tmp_path / "checkpoint", arch), tokens)
    assert expected.std() > 0.3  # logits of some size, or the tolerance would say nothing
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)  # fp32: other orders of additions over three layers


def test_the_rotary_scaling_is_seen_by_that_comparison(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """The same weights without the scaling: the difference the comparison above would show if it were forgotten."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tiny_hf_model("llama3", tie_word_embeddings=False)
    config = AutoConfig.from_pretrained(folder)
    tokens = torch.randint(131, (2, 300), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        scaled = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        config.rope_parameters = {"rope_type": "default", "rope_theta": 80000.0}
        plain = AutoModelForCausalLM.from_pretrained(folder, config=config)(tokens).logits
    assert (scaled - plain).abs().max() > 100 * 1e-4
