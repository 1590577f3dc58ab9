"""What pruning can make of a source: the target architecture, or every size that does not fit."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture, nearest_multiples
from minitron_megatron.config.prune import Target
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import RecipeError

WIDTH_OF_EXPERTS = 8
"""transformers multiplies all experts in one call of torch's grouped_mm, which wants strides of 16 bytes: 8 values in bf16."""


def target_architecture(recipe: Recipe, source: Architecture) -> Architecture:
    """The architecture after pruning; raises RecipeError with every size that does not fit the source."""
    problems = [
        f"prune.target.{name}={size} is larger than the source's {getattr(source, name)}"
        for name, size in recipe.prune.target.sizes().items()
        if size > getattr(source, name) and (name != "experts" or source.experts)
    ]
    problems += _expert_problems(recipe.prune.target, source)
    heads = recipe.prune.target.heads or source.heads
    if heads % source.kv_groups:
        problems.append(
            f"prune.target.heads={heads} is not divisible by the model's {source.kv_groups} key/value groups; "
            f"nearest: {nearest_multiples(heads, source.kv_groups)}"
        )
    hidden = recipe.prune.target.hidden or source.hidden
    if not problems and source.family.hidden_multiple_of_heads and hidden % heads:
        problems.append(
            f"prune.target: hidden={hidden} is not a multiple of heads={heads}, and transformers would not load such a {source.family_name}; "
            f"nearest hidden: {nearest_multiples(hidden, heads)}"
        )
    if problems:
        raise RecipeError(problems)
    return source.resized(**recipe.prune.target.sizes())


def _expert_problems(target: Target, source: Architecture) -> list[str]:
    if not source.experts:
        return [f"prune.target.experts={target.experts}: the family {source.family_name} has no experts; leave it out"] if target.experts else []
    problems = []
    if target.experts and target.experts < source.experts_per_token:
        problems.append(
            f"prune.target.experts={target.experts} is less than the {source.experts_per_token} that each token is sent to; "
            f"at least {source.experts_per_token}"
        )
    for name, size in (("hidden", target.hidden), ("ffn", target.ffn)):
        if size and size % WIDTH_OF_EXPERTS and size != getattr(source, name):
            problems.append(
                f"prune.target.{name}={size} is not a multiple of {WIDTH_OF_EXPERTS}, and transformers would not run such experts; "
                f"nearest: {nearest_multiples(size, WIDTH_OF_EXPERTS)}"
            )
    return problems
