"""What pruning can make of a source: the target architecture, or every size that does not fit."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture, nearest_multiples
from minitron_megatron.config.checks.align import Rounded, ffn_multiple, rounded_sizes
from minitron_megatron.config.checks.widths import kept_layers, layer_problems, width_limits, width_problems, widths_in_source
from minitron_megatron.config.fp8 import Fp8Multiple
from minitron_megatron.config.prune import Prune
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import RecipeError

WIDTH_OF_EXPERTS = 8
"""transformers multiplies all experts in one call of torch's grouped_mm, which wants strides of 16 bytes: 8 values in bf16."""


def target_architecture(recipe: Recipe, source: Architecture) -> Architecture:
    """The architecture after pruning; raises RecipeError with every size that does not fit the source.

    With prune.ffn_by=global its layers have the mean width: the widths themselves follow from the scores, and stand in the plan.
    """
    fp8 = recipe.fp8_multiple
    target, _ = rounded_target(recipe.prune, source, fp8)
    tensor, of_rank = recipe.parallel.tensor, fp8.multiple if fp8 else 1
    if recipe.prune.ffn_by == "global" and ffn_multiple(recipe.prune, fp8) % (tensor * of_rank):
        widths = f"leave multiples of {of_rank} on each rank (FP8)" if fp8 else "divide every layer's width"
        raise RecipeError(f"prune.ffn_by=global: parallel.tensor={tensor} has to {widths}; set prune.align.tensor={tensor}")
    return target


def rounded_target(prune: Prune, source: Architecture, fp8: Fp8Multiple | None = None) -> tuple[Architecture, list[str]]:
    """That architecture whatever the layout, and what alignment changed of the recipe's sizes. fp8: Recipe.fp8_multiple."""
    rounded = rounded_sizes(prune, source, fp8)
    problems = layer_problems(prune, source) + _too_large(rounded, source) + rounded.problems
    problems += _expert_problems(rounded, source) + _head_problems(prune, rounded, source)
    if not problems:
        problems = _hidden_problems(rounded, source) + width_problems(prune, rounded.sizes.get("ffn"), source)
    if problems:
        raise RecipeError(problems)
    sizes = {**rounded.sizes, "layers": kept_layers(prune, source)}
    if source.ffn_per_layer:
        sizes.setdefault("ffn", widths_in_source(prune, source) or source.ffn)
    target = source.resized(**sizes)  # type: ignore[arg-type]  # only ffn may be a list
    problems = _align_problems(prune, target, fp8) + _budget_problems(prune, target, source, fp8)
    if problems:
        raise RecipeError(problems)
    return target, rounded.notes


def _too_large(rounded: Rounded, source: Architecture) -> list[str]:
    return [
        f"prune.target.{name}={size} is larger than the source's {getattr(source, name)}"
        for name, size in rounded.sizes.items()
        if rounded.of(name, source) > getattr(source, name) and (name != "experts" or source.experts)
    ]


def _head_problems(prune: Prune, rounded: Rounded, source: Architecture) -> list[str]:
    heads, groups, size = rounded.of("heads", source), rounded.of("kv_groups", source), source.heads_per_group
    if heads % groups:
        whose = f"prune.target.kv_groups={groups}" if groups < source.kv_groups else f"the model's {groups} key/value groups"
        return [f"prune.target.heads={heads} is not divisible by {whose}; nearest: {nearest_multiples(heads, groups)}"]
    if size * groups < heads <= source.heads:
        return [f"prune.target.heads={heads}, but {groups} key/value groups have {size * groups} in the source; at most {size * groups}"]
    if not prune.head_residual:
        return []
    if size == 1 and heads < source.heads:
        return ["prune.head_residual=true: each head is a key/value group of its own, and no head of it is left to add to; set it to false"]
    if 2 * heads < size * groups:
        least = -(-size // 2) * groups
        return [f"prune.head_residual=true needs at least half of each group's heads: prune.target.heads={least}; or set it to false"]
    return []


def _hidden_problems(rounded: Rounded, source: Architecture) -> list[str]:
    heads, hidden = rounded.of("heads", source), rounded.of("hidden", source)
    if not source.family.hidden_multiple_of_heads or hidden % heads == 0:
        return []
    return [
        f"prune.target: hidden={hidden} is not a multiple of heads={heads}, and transformers would not load such a {source.family_name}; "
        f"nearest hidden: {nearest_multiples(hidden, heads)}"
    ]


def _align_problems(prune: Prune, target: Architecture, fp8: Fp8Multiple | None) -> list[str]:
    """Sizes that are not pruned are not rounded."""
    tensor, multiple = prune.align.tensor, ffn_multiple(prune, fp8)
    sizes = [("kv_groups", target.kv_groups), ("heads", target.heads), *(("ffn", width) for width in sorted(set(target.ffn_widths)))]
    problems = [
        f"prune.align.tensor={tensor} does not divide {name}={size}, which is not pruned; name a smaller prune.target.{name}"
        for name, size in sizes
        if size % tensor
    ]
    if prune.ffn_by == "global" and target.ffn % multiple:
        problems.append(f"prune.ffn_by=global: prune.target.ffn={target.ffn} is no multiple of {multiple}; name a smaller one")
    return problems


def _budget_problems(prune: Prune, target: Architecture, source: Architecture, fp8: Fp8Multiple | None) -> list[str]:
    """Of neurons ranked over all layers, which go in whole blocks, where the source's layers differ in width."""
    if prune.ffn_by != "global":
        return []
    multiple, widths = ffn_multiple(prune, fp8), width_limits(prune, source)
    if min(widths) < multiple:
        return [f"prune.ffn_by=global: a layer of {min(widths)} neurons has no whole block of {multiple}; set prune.align.ffn and .tensor to less"]
    most = sum(width // multiple for width in widths) // len(widths) * multiple
    if target.ffn <= most:
        return []
    whose = "the kept layers" if widths_in_source(prune, source) else "the narrowest layers, which the scores may keep,"
    return [f"prune.ffn_by=global: prune.target.ffn={target.ffn} on average is more than {whose} have in the source; at most {most}"]


def _expert_problems(rounded: Rounded, source: Architecture) -> list[str]:
    experts = rounded.sizes.get("experts")
    if not source.experts:
        return [f"prune.target.experts={experts}: the family {source.family_name} has no experts; leave it out"] if experts else []
    problems = []
    if isinstance(experts, int) and experts < source.experts_per_token:
        problems.append(
            f"prune.target.experts={experts} is less than the {source.experts_per_token} that each token is sent to; "
            f"at least {source.experts_per_token}"
        )
    for name in ("hidden", "ffn"):
        size = rounded.of(name, source)
        if size % WIDTH_OF_EXPERTS and size != getattr(source, name):
            problems.append(
                f"prune.target.{name}={size} is not a multiple of {WIDTH_OF_EXPERTS}, and transformers would not run such experts; "
                f"nearest: {nearest_multiples(size, WIDTH_OF_EXPERTS)}"
            )
    return problems
