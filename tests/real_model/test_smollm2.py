"""A real model: SmolLM2-135M as launch/demo_inputs.py brings it, through import and export."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minitron_megatron.arch.source import source_architecture
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource, write_huggingface
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, write_torch_dist
from minitron_megatron.data.batches import collate
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.model.build import build_model
from minitron_megatron.model.run import forward_only
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.platform import activate

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TEXT = "My fellow citizens, since 1789 the state of our Union has been told in this place: 12 speeches of 34 lines, and 5 jokes."


@pytest.fixture(scope="module")
def model_folder() -> Path:
    subprocess.run([sys.executable, "launch/demo_inputs.py", "--out", ".demo"], cwd=ROOT, check=True)
    return ROOT / ".demo" / "model"


@pytest.fixture(scope="module")
def checkpoint(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, arch = tmp_path_factory.mktemp("smollm2"), source_architecture(str(model_folder))
    source = HuggingFaceSource(model_folder, arch)
    write_torch_dist(folder, tensor_table(arch), arch, dtype=source.dtype, read=source.read)
    return folder


def test_its_logits_equal_those_of_transformers(model_folder: Path, checkpoint: Path, layout: Layout) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor(load_tokenizer(model_folder).encode(TEXT))
    model = build_model(source_architecture(str(model_folder)), layout, activate("cpu"), torch.float32)
    load_model(model, checkpoint)
    [hidden_S1D] = forward_only(model, [collate([tokens], [0])])
    weight = model.output_weight()
    assert weight is not None
    reference = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(tokens[None, :-1]).logits[0]
    torch.testing.assert_close(hidden_S1D[:, 0] @ weight.t(), expected, rtol=0, atol=1e-4)  # fp32; other kernels add in another order


def test_export_gives_back_every_bit_in_several_shards(model_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    arch = source_architecture(str(model_folder))
    write_huggingface(tmp_path, MegatronSource(checkpoint, arch), arch, shard_bytes=64 << 20)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    original, exported = HuggingFaceSource(model_folder, arch), HuggingFaceSource(tmp_path, arch)
    read: Callable[[HuggingFaceSource], list[torch.Tensor]] = lambda source: [source.read(row) for row in tensor_table(arch)]  # noqa: E731
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(read(original), read(exported), strict=True))
