"""What a search asks for against the source model and the rest of the recipe."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.checks.fp8 import fp8_problems
from minitron_megatron.config.checks.layout import shape_problems, teacher_problems
from minitron_megatron.config.checks.teachers import models_problems
from minitron_megatron.config.checks.text import text_problems
from minitron_megatron.config.checks.training import batch_problems
from minitron_megatron.config.prune import Target
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.search import LatencyBudget, Search, Space
from minitron_megatron.config.trial import trial_recipe


def search_problems(recipe: Recipe, search: Search, source: Architecture) -> list[str]:
    """Whether any candidate is left is the survey's question, see search/survey.py."""
    problems = _space_problems(search.space, source) + _beside_problems(recipe, source)
    if recipe.prune.target.sizes():
        problems.append("prune.target: the search chooses the sizes; leave prune.target out, or leave the section search out")
    if not any(_limits(search)):
        problems.append(
            "search has no budget, and the largest model would be the best; set search.parameters, search.nonembedding_parameters, "
            "search.memory.gib or search.latency.limit_ms"
        )
    problems += _latency_problems(search.latency, source) if search.latency else []
    return problems + _training_problems(recipe, search, source)


def _training_problems(recipe: Recipe, search: Search, source: Architecture) -> list[str]:
    """Of the candidates' distillation: what the run's own has, too, is told once and of that one."""

    def problems(of: Recipe) -> list[str]:
        found = shape_problems(of) + teacher_problems(of, source) + models_problems(of, source) + text_problems(of, source)
        return found + fp8_problems(of, source, None)

    # without the stages whose batches are no matter of the candidates
    trial = trial_recipe(recipe, search, {}, correct=None, finetune=None)
    known = problems(recipe)
    return [_of_search(problem) for problem in [*batch_problems(trial), *(problem for problem in problems(trial) if problem not in known)]]


def _beside_problems(recipe: Recipe, source: Architecture) -> list[str]:
    """What else a recipe may say that the candidates of a search cannot follow."""
    problems = []
    if recipe.depth:
        problems.append(
            "depth: how many layers it drops follows from the target, which the search has yet to choose; leave depth out, or give the sizes "
            "that the search chooses to a recipe with depth"
        )
    if recipe.prune.drop_layers is not None:
        problems.append("prune.drop_layers: the search chooses how many layers go, and the scores which; leave it out")
    if recipe.prune.ffn_by == "global":
        problems.append(
            "prune.ffn_by=global gives layers widths of their own, and a search counts memory and latency of one width for all; "
            "set prune.ffn_by=layer"
        )
    if recipe.correct_beside:
        problems.append(
            "correct.beside: candidates trained at different times would have different teachers; set correct.beside=false, or leave correct out"
        )
    if source.ffn_per_layer:
        problems.append("search: the source's layers have FFNs of different widths, and a space names one for all; search from the original")
    return problems


def _limits(search: Search) -> list[float | None]:
    memory, latency = search.memory, search.latency
    return [search.parameters, search.nonembedding_parameters, memory.gib if memory else None, latency.limit_ms if latency else None]


def _of_search(problem: str) -> str:
    return f"search.short_distillation, with what it does not name from distill: {problem.replace('distill.steps', 'rounds[-1]')}"


def _space_problems(space: Space, source: Architecture) -> list[str]:
    problems = []
    if not space.axes() and not space.ffn_factor:
        problems.append(f"search.space names no axis; axes: {', '.join(name for name in Space.model_fields if name != 'alignment')}")
    if space.ffn and space.ffn_factor:
        problems.append("search.space: ffn and ffn_factor both give FFN widths; leave one of them out")
    for axis, sizes in space.axes().items():
        if axis not in Target.model_fields:
            problems.append(f"search.space.{axis}: pruning does not cut this axis; leave it out")
        elif axis == "experts" and not source.experts:
            problems.append(f"search.space.experts: the family {source.family_name} has no experts; leave it out")
        elif max(sizes) > getattr(source, axis):
            problems.append(f"search.space.{axis}: {max(sizes)} is larger than the source's {getattr(source, axis)}")
        if axis in ("hidden", "ffn") and (odd := [size for size in sizes if size % space.alignment and size != getattr(source, axis)]):
            problems.append(f"search.space.{axis}: {', '.join(map(str, odd))} are no multiples of search.space.alignment={space.alignment}")
    return problems


def _latency_problems(latency: LatencyBudget, source: Architecture) -> list[str]:
    problems = []
    if latency.kind == "roofline" and latency.gpu is None:
        problems.append("search.latency.gpu is missing: a roofline is that of a GPU, such as H100_SXM; or set search.latency.kind=measured")
    if latency.kind == "measured" and source.experts:
        problems.append("search.latency.kind=measured times dense layers, and the model has experts; use roofline")
    if latency.gpu in ("A100_SXM_80GB",) and latency.precision == "fp8":
        problems.append(f"search.latency.precision=fp8: {latency.gpu} multiplies in no fp8; use bf16")
    reach = latency.prompt + latency.generate
    if reach > source.max_positions:
        problems.append(f"search.latency: prompt + generate = {reach} is beyond the model's {source.max_positions} positions")
    return problems
