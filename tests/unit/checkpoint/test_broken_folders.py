"""Hugging Face folders that are not whole, or of another model: refused in one line before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_megatron.arch.source import source_architecture
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource, write_huggingface
from minitron_megatron.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def single(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a model of one file, to be broken."""
    return Path(shutil.copytree(tiny_hf_model("llama"), tmp_path / "single"))


@pytest.fixture
def sharded(single: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    arch = source_architecture(str(single))
    write_huggingface(folder, HuggingFaceSource(single, arch), arch, shard_bytes=20_000)
    shutil.copy(single / "config.json", folder)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceSource(folder, source_architecture(str(folder)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].unlink()
    assert f"names {shards[1].name}, which is missing; copy the model anew" in refused(sharded)
    shards[2].unlink()
    assert f"names {shards[1].name}, {shards[2].name}, which are missing" in refused(sharded)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_truncated_file_is_named(kind: str, kept: float, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    assert f"{file}: not a whole safetensors file" in refused(folder)


def test_a_folder_without_weights_says_what_it_needs(single: Path) -> None:
    (single / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json is there" in refused(single)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_named(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    assert str(sharded / "model.safetensors.index.json") in refused(sharded)


def test_an_index_that_names_a_tensor_in_the_wrong_shard_is_refused(sharded: Path) -> None:
    """Seen where shards of two downloads were mixed."""
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"][EMBEDDING] = shards[-1]
    file.write_text(json.dumps(index))
    message = refused(sharded)
    assert EMBEDDING in message and shards[-1] in message


def test_a_missing_tensor_is_named(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "tensor model.layers.1.mlp.up_proj.weight is in none of the safetensors files" in refused(single)


def test_a_wrong_vocabulary_size_is_told_as_such(single: Path) -> None:
    for vocab in (130, 256):
        set_config(single, vocab_size=vocab)
        message = refused(single)
        assert f"has shape [131, 40], but config.json means [{vocab}, 40]; vocab_size is wrong" in message


def test_a_wrong_size_is_told_with_both_shapes(single: Path) -> None:
    set_config(single, intermediate_size=30)
    assert "has shape [28, 40], but config.json means [30, 40]" in refused(single)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.3.mlp.up_proj.weight", "score.weight"])
def test_a_foreign_tensor_is_refused(name: str, single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({name: torch.ones(3)}))
    assert f"tensor {name} is not part of family 'llama'" in refused(single)


def test_tensors_that_every_model_computes_anew_are_no_mistake(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    HuggingFaceSource(single, source_architecture(str(single)))


def test_a_copy_of_tied_embeddings_is_allowed_and_one_that_differs_is_not(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """Tied in config.json with an output weight of its own: transformers and this tool would build another model than was trained."""
    folder = Path(shutil.copytree(tiny_hf_model("llama", tie_word_embeddings=True), tmp_path / "tied"))
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    HuggingFaceSource(folder, source_architecture(str(folder)))
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].mul_(2))
    assert "lm_head.weight" in refused(folder)
