"""What a source's units cannot be ranked by."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.criteria import AxisAggregation
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
