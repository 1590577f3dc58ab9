"""What a recipe needs Transformer Engine or apex for, told as a start settles the machine: ahead of the hours before a stage that trains."""

from __future__ import annotations

from importlib.util import find_spec

from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import PlatformError
from minitron_megatron.platform.activate import Platform


def require_engine(recipe: Recipe, platform: Platform) -> None:
    """Raises PlatformError with all that is missing; platform: this process's own."""
    problems = [*_overlap_problems(recipe, platform), *_optimizer_problems(recipe, platform)]
    if problems:
        raise PlatformError("\n".join(problems))


def _overlap_problems(recipe: Recipe, platform: Platform) -> list[str]:
    if not recipe.training.overlap_tensor_parallel or platform.transformer_engine:
        return []
    return ["training.overlap_tensor_parallel=true needs Transformer Engine on CUDA; install it, or set it to false"]


def _optimizer_problems(recipe: Recipe, platform: Platform) -> list[str]:
    """Over one data-parallel rank the optimizer is the plain one; on a CPU its kernel is ours (group_adam.py)."""
    parallel = recipe.parallel
    shared = recipe.training.distributed_optimizer and parallel.data * parallel.context > 1
    if not shared or platform.kind == "cpu" or platform.transformer_engine or find_spec("apex"):
        return []
    return [
        "training.distributed_optimizer=true needs Transformer Engine's or apex's fused Adam: with torch's, megatron-core cannot load "
        "the checkpoints that it writes; install one of them, or set training.distributed_optimizer=false"
    ]
