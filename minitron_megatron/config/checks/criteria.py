"""What a source's units cannot be ranked by."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.criteria import DEFAULT_RANKING, AggregatedAxis, AxisAggregation
from minitron_megatron.config.importance import Importance
from minitron_megatron.config.prune import Prune


def criteria_problems(prune: Prune, source: Architecture) -> list[str]:
    """Of a model with experts, and of one without."""
    problems = []
    if source.experts and prune.criteria.ffn == "before_activation":
        problems.append(
            "prune.criteria.ffn=before_activation: neurons of experts are scored behind the router's weight, which comes after the activation; "
            "set prune.criteria.ffn=input_of_second"
        )
    if not source.experts and prune.aggregations.experts != AxisAggregation():
        problems.append(f"prune.aggregations.experts: the family {source.family_name} has no experts; leave it out")
    return problems


def sums_problems(importance: Importance, prune: Prune) -> list[str]:
    """What prune ranks by, and importance does not measure."""
    if importance.sums == "all" or not prune.reads_importance:
        return []
    missing = [f"prune.criteria.{name}={getattr(prune.criteria, name)}" for name in ("ffn", "heads", "channels") if _is_other(prune, name)]
    axes: list[AggregatedAxis] = ["ffn", "heads", "channels", "experts"]
    missing += sorted({f"sequence={prune.ranking.of(axis).sequence}" for axis in axes} - {"sequence=mean"})
    if not missing:
        return []
    return [f"importance.sums=default does not measure what prune ranks by ({', '.join(missing)}); set importance.sums=all"]


def _is_other(prune: Prune, name: str) -> bool:
    return bool(getattr(prune.criteria, name) != getattr(DEFAULT_RANKING.criteria, name))
