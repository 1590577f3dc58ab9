"""Cross-checks of a recipe against the architecture: every problem at once, each with its mend."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture, nearest_multiples
from minitron_megatron.config.checks.criteria import criteria_problems, sums_problems
from minitron_megatron.config.checks.depth import block_size_problems, depth_problems
from minitron_megatron.config.checks.export import export_problems
from minitron_megatron.config.checks.fp8 import fp8_problems
from minitron_megatron.config.checks.layout import layout_problems, list_problems, shape_problems, teacher_problems
from minitron_megatron.config.checks.losses import vocabulary_problems
from minitron_megatron.config.checks.search import search_problems
from minitron_megatron.config.checks.target import target_architecture
from minitron_megatron.config.checks.teacher_logits import stored_problems
from minitron_megatron.config.checks.teachers import Planned, models_problems, stage_problems, teacher_architectures
from minitron_megatron.config.checks.text import text_problems
from minitron_megatron.config.checks.training import batch_problems, hidden_problems, overlap_problems, training_problems
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import RecipeError


def check_recipe(recipe: Recipe, source: Architecture, planned: Planned | None = None) -> Architecture:
    """Raises RecipeError with everything in the recipe that this source cannot do; returns the target architecture.

    That is the source's own where a search has yet to choose. planned: models that its teachers may be and that do not exist yet.
    """
    if recipe.search:
        problems = search_problems(recipe, recipe.search, source)
        layers = {source.layers, *(recipe.search.space.layers or ())}
        target = source
    else:
        problems, target = _target_problems(recipe, source, planned)
        layers = {source.layers, target.layers}
    problems += fp8_problems(recipe, source, None if recipe.search or problems else target, planned)
    problems += layout_problems(recipe.parallel, source, "the source model")
    if target != source:
        problems += layout_problems(recipe.parallel, target, "the pruned model")
    stages, rule = recipe.parallel.pipeline * recipe.parallel.virtual, recipe.parallel.layers_per_stage
    problems += list_problems("parallel", stages, rule, layers)
    problems += shape_problems(recipe) + teacher_problems(recipe, source)
    problems += stage_problems(recipe) + models_problems(recipe, source, planned)
    problems += _length_problems(recipe, source)
    problems += batch_problems(recipe) + vocabulary_problems(recipe.distill, source) + block_size_problems(recipe, source)
    problems += text_problems(recipe, source) + stored_problems(recipe, source)
    if recipe.prune.scores_file and recipe.prune.scores != "activation":
        problems.append(f"prune.scores_file holds activation scores, but prune.scores={recipe.prune.scores}; leave one of them out")
    problems += criteria_problems(recipe.prune, source) + sums_problems(recipe.importance, recipe.prune)
    problems += training_problems(recipe.training) + overlap_problems(recipe)
    problems += export_problems(recipe, source)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return target


def _target_problems(recipe: Recipe, source: Architecture, planned: Planned | None) -> tuple[list[str], Architecture]:
    """Of the sizes that the recipe names; with the architecture that they make, the source's where there is none."""
    if "target" not in recipe.prune.model_fields_set and recipe.prune.drop_layers is None:
        return ["prune.target is missing; give the sizes to keep, such as prune.target.ffn, or a section search"], source
    try:
        target = target_architecture(recipe, source)
    except RecipeError as error:
        return list(error.problems), source
    teacher = teacher_architectures(recipe, source, planned)[0]
    return hidden_problems(recipe, teacher, target) + depth_problems(recipe, source, target), target


def _length_problems(recipe: Recipe, arch: Architecture) -> list[str]:
    problems = []
    limit = min(arch.max_positions, arch.attention_window or arch.max_positions)
    lengths = {name: getattr(recipe, name).sequence_length for name in ("importance", *(["depth"] if recipe.depth else []), "evaluate")}
    lengths |= {section: run.sequence_length for section, run in recipe.training_runs().items()}
    if recipe.search and recipe.search.short_distillation.sequence_length:
        lengths["search.short_distillation"] = recipe.search.short_distillation.sequence_length
    for section, length in lengths.items():
        if length > limit:
            problems.append(f"{section}.sequence_length={length} is beyond the model's {limit} positions; at most {limit}")
        if recipe.parallel.sequence and length % recipe.parallel.tensor:
            problems.append(
                f"{section}.sequence_length={length} is not divisible by parallel.tensor={recipe.parallel.tensor} (sequence parallel); "
                f"nearest: {nearest_multiples(length, recipe.parallel.tensor)}"
            )
    return problems
