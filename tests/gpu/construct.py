"""Builds tiny models of Transformer Engine's modules and of the local spec's, and names what each would save; a process of its own.

Usage: construct.py {gpu | no-driver}. Prints one JSON object: family → what each spec would save, {key and place in it: [type, whole shape, this
part's]}; the core attention in bf16 and in fp32; weights that have not come through two checkpoints, one of either spec; a teacher's modules in the
student's groups. no-driver: with CUDA builds of torch and Transformer Engine on a machine without a GPU, weights on the CPU; what asks about the
GPU is told of a Hopper.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils._pytree import tree_leaves

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import chunk_state, load_model, model_state, save_state
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.model import gpt
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.modules import block_spec
from minitron_megatron.parallel.layout import Layout, _grid_groups, destroy_layout, global_layout
from minitron_megatron.parallel.world import World, distributed_world
from minitron_megatron.platform import Platform, activate
from minitron_megatron.platform.engine import import_problem

SIZES = (3, 64, 8, 2, 16, 96, 131)
FAMILIES = {
    "llama": Architecture("llama", *SIZES, False, 64, 1e-5, 10000.0),
    "llama of uneven layers": Architecture("llama", *SIZES, False, 64, 1e-5, 10000.0).resized(ffn=[32, 96, 64]),
    "mistral": Architecture("mistral", *SIZES, False, 64, 1e-5, 10000.0),
    "qwen2": Architecture("qwen2", *SIZES, True, 64, 1e-6, 1000.0),
    "qwen3": Architecture("qwen3", *SIZES, False, 64, 1e-6, 1000.0),
    "nemotron": Architecture("nemotron", *SIZES, False, 64, 1e-5, 10000.0, rotary_share=0.5),
    "mixtral": Architecture("mixtral", *SIZES, False, 64, 1e-5, 10000.0, None, None, 4, 2),
    "qwen3_moe": Architecture("qwen3_moe", *SIZES, True, 64, 1e-6, 1000.0, None, None, 6, 3, normalised_routing=False),
}


def main(machine: str) -> None:
    problem = import_problem()
    if problem:
        sys.exit(f"Transformer Engine: {problem}")
    if machine == "gpu":
        print(json.dumps(every_family(activate("cuda"))))
        return
    hopper = {
        "current_device": lambda: "cpu",
        "get_device_capability": lambda *_: (9, 0),
        "is_available": lambda: True,
        "synchronize": lambda *_: None,
        "Stream": mock.MagicMock,
    }
    with mock.patch.multiple(torch.cuda, **hopper), mock.patch.object(tensor_parallel, "model_parallel_cuda_manual_seed"):
        print(json.dumps(every_family(Platform("cuda", "gloo", torch.device("cpu"), transformer_engine=True))))


def every_family(platform: Platform) -> dict[str, dict[str, object]]:
    with distributed_world(platform) as world:
        return {name: both_specs(arch, world) for name, arch in FAMILIES.items()}


def both_specs(arch: Architecture, world: World) -> dict[str, object]:
    destroy_layout()
    layout = global_layout(Parallel(), world)
    engine = build_model(arch, layout, world.platform, torch.bfloat16)
    if not any(type(module).__name__ == "TELayerNormColumnParallelLinear" for module in engine.last.modules()):
        raise RuntimeError(f"{arch.family.name}: no layer of Transformer Engine's was built")
    # experts on CUDA are refused without Transformer Engine, whose function the router calls: here their layers alone are others
    with mock.patch.object(gpt, "block_spec", local_block_spec):
        local = build_model(arch, layout, world.platform, torch.bfloat16)
    return {
        "engine": saved(engine),
        "local": saved(local),
        "differ after two loads": differ_after_two_loads(local, engine),
        "attention": {str(dtype): attention(build_model(arch, layout, world.platform, dtype)) for dtype in (torch.bfloat16, torch.float32)},
        "in the student's groups": [] if arch.experts else in_others_groups(arch, layout, world.platform),
    }


def attention(model: StageModel) -> list[str]:
    """Classes of the layers' core attention."""
    return sorted({type(layer.self_attention.core_attention).__name__ for layer in model.layers()})


def in_others_groups(arch: Architecture, student: Layout, platform: Platform) -> list[str]:
    """Modules of a teacher with groups of its own that were given the student's, megatron's global ones."""
    teacher = dataclasses.replace(student, groups=_grid_groups(student))
    model = build_model(arch, teacher, platform, torch.bfloat16, output_layer=None)
    groups = [(name, getattr(module, key, None)) for name, module in model.last.named_modules() for key in ("tp_group", "_tp_group")]
    if sum(group is teacher.groups.tp for _, group in groups) < 10:
        raise RuntimeError("a module keeps its tensor-parallel group under another name than tp_group")
    return [name for name, group in groups if group is not None and group is not teacher.groups.tp]


def differ_after_two_loads(local: StageModel, engine: StageModel) -> list[str]:
    """Weights that are others once they have gone from the local spec to the engine's and back, through checkpoints."""
    generator = torch.Generator().manual_seed(2)
    for weight in local.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=generator))
    before = {name: weight.clone() for name, weight in local.last.named_parameters()}
    for source, target in ((local, engine), (engine, local)):
        with TemporaryDirectory() as folder:
            save_state(model_state(source), Path(folder))
            for weight in target.parameters():
                weight.data.zero_()
            load_model(target, Path(folder))
    return [name for name, weight in local.last.named_parameters() if not torch.equal(weight, before[name])]


def local_block_spec(config: TransformerConfig, layers: range) -> TransformerBlockSubmodules:
    return block_spec(dataclasses.replace(config, transformer_impl="local"), layers)


def saved(model: StageModel) -> dict[str, object]:
    """Every entry, the halves of a gated matrix apart."""
    found: dict[str, object] = {}
    for name, entry in chunk_state(model.last).items():
        parts = tree_leaves(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            if not isinstance(part, ShardedTensor):
                raise TypeError(f"{name}: {type(part).__name__} is no tensor, so that a checkpoint of the other spec lacks it")
            found[f"{part.key} {list(part.global_offset)}"] = [str(part.dtype), list(part.global_shape), list(part.local_shape)]
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
