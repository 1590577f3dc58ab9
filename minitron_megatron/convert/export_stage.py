"""Stage `export`: the last checkpoint of the chain → a Hugging Face folder that plain `transformers` loads, or a .nemo archive."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.arch.architecture import Architecture, parameter_count, width_range
from minitron_megatron.arch.hf_config import hf_config_for
from minitron_megatron.artifact import Artifact, require_disk_space, write_json
from minitron_megatron.checkpoint.huggingface import write_huggingface
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, checkpoint_bytes
from minitron_megatron.config.schema import Recipe
from minitron_megatron.convert.fast_tokenizer import add_fast_tokenizer
from minitron_megatron.convert.nemo_archive import ARCHIVE, write_nemo
from minitron_megatron.convert.tokenizer_files import copy_tokenizer
from minitron_megatron.convert.widen import WidenedSource
from minitron_megatron.progress import byte_progress


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Writes model/ (config.json, safetensors, tokenizer) or model.nemo into the folder.

    Layers whose FFNs differ in width are filled up with zeros to the widest one's: transformers has one width for these families.
    """
    pruned, original = inputs["prune"], inputs["import"]
    student = Architecture.from_dict(pruned.result["architecture"])
    arch = student.resized(ffn=student.ffn)
    source = WidenedSource(MegatronSource(inputs.get("finetune", inputs["distill"]).path / "checkpoint", student), arch)
    as_nemo = recipe.export.format == "nemo"
    size = checkpoint_bytes(tensor_table(arch), arch, source.dtype)
    # an archive is packed out of a folder of the same size
    require_disk_space(folder, 2 * size if as_nemo else size, "the exported model")
    config = _config(original, pruned.result["kept_layers"], source)
    if as_nemo:
        with byte_progress("export", size) as on_bytes:
            write_nemo(folder, source, config, original.path / "tokenizer", on_bytes)
    else:
        shutil.rmtree(folder / "model", ignore_errors=True)  # of a start that was killed: a tokenizer.json may be half of one
        copy_tokenizer(original.path / "tokenizer", folder / "model")
        add_fast_tokenizer(folder / "model")
        with byte_progress("export", size) as on_bytes:
            write_huggingface(folder / "model", source, arch, on_bytes=on_bytes)
        write_json(folder / "model" / "config.json", config)
    final = Path(recipe.runs) / recipe.name / "export" / (ARCHIVE if as_nemo else "model")
    opened = "read it with model.path=" + str(final) if as_nemo else "loads with AutoModelForCausalLM.from_pretrained"
    return {
        "summary": f"{final}: {parameter_count(arch):,} parameters, {size / 1e9:.2f} GB, {opened}"
        + (f"; FFNs of {width_range(student)} neurons filled up with zeros to {arch.ffn}" if student.ffn_per_layer else ""),
        "bytes": size,
        "parameters": parameter_count(arch),
    }


def _config(original: Artifact, kept_layers: list[int], source: WidenedSource) -> dict[str, Any]:
    """config.json of the student."""
    config = json.loads((original.path / "hf_config.json").read_text())
    dtype = str(source.dtype(tensor_table(source.arch)[0])).removeprefix("torch.")
    # transformers 4 wrote torch_dtype: the source's must not contradict what the student's weights are
    config.update({spelling: dtype for spelling in ("dtype", "torch_dtype") if spelling == "dtype" or spelling in config})
    return hf_config_for(config, kept_layers, source.arch)
