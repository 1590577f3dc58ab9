"""What dropping layers by section `depth` has to agree on with the source and the target."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.depth import Depth
from minitron_megatron.config.schema import Recipe


def depth_problems(recipe: Recipe, source: Architecture, target: Architecture) -> list[str]:
    """None where the recipe has no section `depth`."""
    depth, problems = recipe.depth, []
    if depth is None:
        return []
    drop = depth.drop or source.layers - target.layers
    if drop < 1:
        problems.append("depth: no layer is to be dropped; set prune.target.layers below the source's, or leave the section out")
    if depth.drop and source.layers - depth.drop != target.layers:
        problems.append(
            f"depth.drop={depth.drop} leaves {source.layers - depth.drop} of {source.layers} layers, but the target has {target.layers}; "
            f"set prune.target.layers={source.layers - depth.drop}, or leave depth.drop out"
        )
    if recipe.prune.drop_layers is not None:
        problems.append("prune.drop_layers names the layers that section depth would choose; leave one of them out")
    free = source.layers - depth.first_protected - depth.last_protected
    if free < drop:
        problems.append(
            f"depth: first_protected={depth.first_protected} and last_protected={depth.last_protected} leave {max(free, 0)} layers to choose "
            f"{drop} from; protect fewer"
        )
    return problems + _criterion_problems(depth, drop, recipe.importance.block_sizes)


def block_size_problems(recipe: Recipe, source: Architecture) -> list[str]:
    """Of section `importance`."""
    return [
        f"importance.block_sizes: {size} is more than the model's {source.layers} layers; at most {source.layers}"
        for size in recipe.importance.block_sizes
        if size > source.layers
    ]


def settled_depth(recipe: Recipe, source: Architecture, target: Architecture) -> Recipe:
    """The recipe with depth.drop as a number: what a stage's result depends on has to stand in its section."""
    if recipe.depth is None:
        return recipe
    return recipe.model_copy(update={"depth": recipe.depth.model_copy(update={"drop": source.layers - target.layers})})


def _criterion_problems(depth: Depth, drop: int, block_sizes: list[int]) -> list[str]:
    problems = []
    if (depth.criterion == "task") != bool(depth.tasks):
        mend = "name lm-eval task files in depth.tasks" if depth.criterion == "task" else "set depth.criterion=task, or leave depth.tasks out"
        problems.append(f"depth.criterion={depth.criterion} with {len(depth.tasks)} depth.tasks; {mend}")
    if depth.criterion == "influence" and depth.how == "greedy":
        problems.append("depth.removal=greedy measures anew after each layer, and depth.criterion=influence measures nothing; use block or ranked")
    if depth.criterion == "influence" and depth.how == "block" and drop > 1 and drop not in block_sizes:
        problems.append(
            f"depth.criterion=influence of a block of {drop} layers is not in the importance pass; set importance.block_sizes=[{drop}], "
            "or depth.removal=ranked"
        )
    return problems
