"""Every candidate in closed form, and which of them fit the budgets: thousands in a second, nothing is built.

Source: arXiv 2407.14679, section 2.4: all shapes within a tolerance of the parameter budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from minitron_megatron.arch.architecture import Architecture, kv_cache_bytes_per_token, nonembedding_parameter_count, parameter_count
from minitron_megatron.config.checks.fp8 import ends_problems
from minitron_megatron.config.checks.fp8_sizes import student_size_problems
from minitron_megatron.config.checks.layout import layout_problems, list_problems
from minitron_megatron.config.checks.target import target_architecture
from minitron_megatron.config.checks.teachers import teacher_architectures
from minitron_megatron.config.checks.training import hidden_problems
from minitron_megatron.config.schema import Recipe
from minitron_megatron.config.search import BYTES_OF, MemoryBudget, Search
from minitron_megatron.config.trial import trial_recipe
from minitron_megatron.errors import RecipeError
from minitron_megatron.search.latency import GPUS, LatencyModel, Roofline, visible
from minitron_megatron.search.space import cut_sizes, enumerate_space, name_of

PLACE = "recipe"
"""What removes a shape that the rest of the recipe (family, layout, losses) cannot prune to or train."""


@dataclass(frozen=True)
class Budget:
    """One figure of a candidate and its limit."""

    name: str
    unit: str
    figure: Callable[[Architecture], float]
    limit: float | None
    tolerance: float | None = None
    """Share by which the figure may miss the limit on both sides; None: the limit is the most that is allowed."""

    def miss(self, value: float) -> float:
        """Share of the limit by which a figure is outside of it; 0 inside."""
        if self.limit is None:
            return 0.0
        over = value / self.limit - 1
        # figures that meet a bound to the last digit are inside: 5 % of a decimal number is none in binary
        miss = over if self.tolerance is None else abs(over) - self.tolerance
        return miss if miss > 1e-12 else 0.0

    def describe(self) -> str:
        if self.limit is None:
            return "no limit"
        bound = f"± {100 * self.tolerance:g} %" if self.tolerance is not None else "at most"
        return f"{bound} {self.limit:,.6g} {self.unit}" if self.tolerance is None else f"{self.limit:,.0f} {bound}"


@dataclass(frozen=True)
class Candidate:
    """One shape with its figures (parameters, nonembedding_parameters, memory in GiB, latency in ms)."""

    arch: Architecture
    source: Architecture
    figures: dict[str, float]
    misses: dict[str, float]
    """By budget, for those that it misses."""
    reason: str = ""
    """Why the recipe cannot make it, where it can not."""

    @property
    def name(self) -> str:
        return name_of(self.arch)

    @property
    def removed_by(self) -> str:
        """The first budget that it misses; empty for a survivor."""
        return next(iter(self.misses), PLACE if self.reason else "")


@dataclass(frozen=True)
class Survey:
    """All candidates of a space with their figures."""

    source: Architecture
    budgets: list[Budget]
    candidates: list[Candidate]
    impossible: int
    """Combinations of sizes that are no model of the family."""

    @cached_property
    def survivors(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if not candidate.removed_by]

    @property
    def largest(self) -> Architecture:
        """The survivor of the most parameters."""
        return max((candidate.arch for candidate in self.survivors), key=parameter_count)

    def removals(self) -> list[tuple[str, str, int, int]]:
        """(budget, its limit, candidates that miss it, candidates that it is the first to remove), in order."""
        rows = [
            (
                budget.name,
                budget.describe(),
                sum(budget.name in candidate.misses for candidate in self.candidates),
                sum(candidate.removed_by == budget.name for candidate in self.candidates),
            )
            for budget in self.budgets
            if budget.limit is not None
        ]
        place = sum(candidate.removed_by == PLACE for candidate in self.candidates)
        first = next((candidate.reason for candidate in self.candidates if candidate.reason), "what this recipe can prune to and train")
        return [*rows, (PLACE, first, place, place)]


def survey(recipe: Recipe, search: Search, source: Architecture, latency: LatencyModel | None = None) -> Survey:
    """latency: the fitted one where it is measured; without it a measured latency removes nothing."""
    fp8 = recipe.fp8_multiple
    everything = enumerate_space(search.space, source, fp8.multiple * recipe.prune.align.tensor if fp8 else 1)
    budgets = budgets_of(search, latency)
    candidates = [_judged(arch, source, budgets) for arch in everything.architectures]
    teacher = teacher_architectures(recipe, source)[0]
    candidates = [replace(item, reason=_obstacle(recipe, search, source, item.arch, teacher)) if not item.misses else item for item in candidates]
    return Survey(source, budgets, candidates, everything.impossible)


def require_survivors(found: Survey) -> None:
    """Raises RecipeError with what removed the candidates: why those within the budgets cannot be made, or else what came closest to them."""
    if found.survivors:
        return
    counts = ", ".join(f"{name} removes {first}" for name, _, _, first in found.removals() if first)
    head = f"search: none of {len(found.candidates)} candidates is left ({counts or f'{found.impossible} combinations are no model'})"
    reasons = {candidate.reason for candidate in found.candidates if candidate.reason}
    if reasons or not found.candidates:
        raise RecipeError(f"{head}; {min(reasons, default='give sizes that go together')}")
    nearest = min(found.candidates, key=lambda candidate: max(candidate.misses.values()))
    limits = {budget.name: budget.describe() for budget in found.budgets}
    misses = ", ".join(
        f"{name} {nearest.figures[name]:,.6g} where {limits[name]} is allowed ({100 * miss:.2g} % beyond)" for name, miss in nearest.misses.items()
    )
    raise RecipeError(f"{head}; nearest miss: {nearest.name}: {misses}; widen search.space or the budget")


def surviving(recipe: Recipe, search: Search, source: Architecture) -> Survey:
    """The survey before anything is measured; raises RecipeError where nothing survives it."""
    found = survey(recipe, search, source)
    require_survivors(found)
    return found


def budgets_of(search: Search, latency: LatencyModel | None = None) -> list[Budget]:
    """In the order in which they remove; figures without a limit are there to be reported."""
    budgets = [
        Budget("parameters", "", parameter_count, search.parameters, search.tolerance),
        Budget("nonembedding_parameters", "", nonembedding_parameter_count, search.nonembedding_parameters, search.tolerance),
    ]
    memory, request = search.memory, search.latency
    if memory:
        budgets.append(Budget("memory", "GiB", lambda arch: serving_gib(arch, memory), memory.gib))
    if request and request.kind == "roofline" and request.gpu:
        latency = Roofline(GPUS[request.gpu], request)
    if request and latency:
        seconds = latency.seconds
        budgets.append(Budget("latency", "ms", lambda arch: 1000 * seconds(arch), request.limit_ms))
    return budgets


def serving_gib(arch: Architecture, memory: MemoryBudget) -> float:
    """Weights and the KV cache of a whole batch, each in its data type; a sliding window bounds the cache."""
    cached = memory.batch * visible(arch, memory.context) * kv_cache_bytes_per_token(arch, 1)
    return (parameter_count(arch) * BYTES_OF[memory.weights] + cached * BYTES_OF[memory.kv_cache]) / 2**30


def _judged(arch: Architecture, source: Architecture, budgets: list[Budget]) -> Candidate:
    figures = {budget.name: budget.figure(arch) for budget in budgets}
    misses = {budget.name: miss for budget in budgets if (miss := budget.miss(figures[budget.name]))}
    return Candidate(arch, source, figures, misses)


def _obstacle(recipe: Recipe, search: Search, source: Architecture, arch: Architecture, teacher: Architecture) -> str:
    """Why this recipe cannot prune to the shape or train it; empty where it can."""
    trial = trial_recipe(recipe, search, cut_sizes(arch, source))
    if untrainable := student_size_problems(recipe, arch, "a candidate") + (ends_problems(recipe.fp8, arch) if recipe.fp8 else []):
        return untrainable[0]
    try:
        target = target_architecture(trial, source)
    except RecipeError as error:
        return error.problems[0]
    if target != arch:
        return "prune.align would round its sizes; give sizes in search.space that are multiples already, or leave prune.align out"
    parallel, layers = recipe.parallel, {source.layers, arch.layers}
    problems = layout_problems(parallel, arch, "a candidate") + hidden_problems(trial, teacher, arch)
    problems += list_problems("parallel", parallel.pipeline * parallel.virtual, parallel.layers_per_stage, layers)
    return problems[0] if problems else ""
