"""Stage `export`: the last checkpoint of the chain → a Hugging Face folder that plain `transformers` loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.arch.hf_config import hf_config_for
from minitron_megatron.artifact import Artifact, require_disk_space, write_json
from minitron_megatron.checkpoint.huggingface import write_huggingface
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, checkpoint_bytes
from minitron_megatron.config.schema import Recipe
from minitron_megatron.convert.tokenizer_files import copy_tokenizer


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Writes model/ into the folder: config.json, safetensors, tokenizer."""
    pruned, original = inputs["prune"], inputs["import"]
    arch = Architecture.from_dict(pruned.result["architecture"])
    source = MegatronSource(inputs.get("finetune", inputs["distill"]).path / "checkpoint", arch)
    require_disk_space(folder, checkpoint_bytes(tensor_table(arch), arch, source.dtype), "the exported model")
    target = folder / "model"
    copy_tokenizer(original.path / "tokenizer", target)
    size = write_huggingface(target, source, arch)
    config = json.loads((original.path / "hf_config.json").read_text())
    dtype = str(source.dtype(tensor_table(arch)[0])).removeprefix("torch.")
    # transformers 4 wrote torch_dtype: the source's must not contradict what the student's weights are
    config.update({spelling: dtype for spelling in ("dtype", "torch_dtype") if spelling == "dtype" or spelling in config})
    write_json(target / "config.json", hf_config_for(config, pruned.result["kept_layers"], arch))
    final = Path(recipe.runs) / recipe.name / "export" / "model"
    return {
        "summary": f"{final}: {parameter_count(arch):,} parameters, {size / 1e9:.2f} GB, loads with AutoModelForCausalLM.from_pretrained",
        "bytes": size,
        "parameters": parameter_count(arch),
    }
