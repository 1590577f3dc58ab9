"""The recipe of one candidate of a search: the same run with given sizes and a short distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitron_megatron.config.prune import Target
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.search import Search

OVERRIDES = ("global_batch", "micro_batch", "sequence_length", "learning_rate", "validation_samples", "save_every_steps")


def trial_recipe(recipe: Recipe, search: Search, sizes: Mapping[str, int], **fields: Any) -> Recipe:
    """The recipe that prunes to these sizes and distils for as long as the last round; fields replace those of the recipe.

    Learning rates are those of the last round's length from the start: a candidate that goes on continues its own run.
    """
    short, last = search.short_distillation, search.short_distillation.rounds[-1]
    named = {name: getattr(short, name) for name in OVERRIDES if getattr(short, name) is not None}
    # it is saved and validated where a round ends; only one that has far to go saves in between
    often = {"save_every_steps": last, "validate_every_steps": last, "keep_checkpoints": 1, "wandb": None}
    distill = recipe.distill.model_copy(update={"steps": last, **often, **named})
    # sizes that the recipe's Target does not have are reported by the checks
    prune = recipe.prune.model_copy(update={"target": Target(**{name: size for name, size in sizes.items() if name in Target.model_fields})})
    return recipe.model_copy(update={"search": None, "prune": prune, "distill": distill, **fields})
