"""The works of a distillation's pipeline stages, counted from the architectures; in the unit of one student layer's forward pass of mean width."""

from __future__ import annotations

from collections.abc import Sequence

from minitron_megatron.arch.architecture import Architecture, layer_cost, layer_costs, output_cost
from minitron_megatron.config.parallel import Rule
from minitron_megatron.parallel.split import distillation_work, hidden_state_work, layer_works, split_layers
from minitron_megatron.schedule.simulate import StageWorks


def distillation_works(student: Architecture, teachers: Sequence[Architecture], ranks: int, rule: Rule = "cost", *, virtual: int = 1) -> StageWorks:
    """All models split as the distillation splits them, the student's layers over virtual stages too; raises LayoutError for more stages than
    a model has layers.

    Counted are the matrices that a token meets: a backward pass is two forward ones. The student's last stage makes the loss in its forward pass,
    with the gradients of its output layer and with the teacher's output layer. Attention over the sequence is left out: it grows both alike.
    """
    unit = layer_cost(student)
    ends = distillation_work(student, *teachers)
    layers = _of_stages(layer_costs(student), split_layers(student.layers, ranks * virtual, rule, ends, layer_works(student), ranks=ranks))
    loss = 3 * output_cost(student) + sum(map(output_cost, teachers))
    forward = [*layers[:-1], layers[-1] + loss]
    before = [0] * ranks
    for teacher in teachers:
        split = split_layers(teacher.layers, ranks, _of_whole_ranks(rule, ranks), hidden_state_work(teacher), layer_works(teacher))
        before = [cost + more for cost, more in zip(before, _of_stages(layer_costs(teacher), split), strict=True)]
    return StageWorks(*(tuple(cost / unit for cost in costs) for costs in (before, forward, [2 * cost for cost in layers])))


def _of_whole_ranks(rule: Rule, ranks: int) -> Rule:
    """Of a teacher, which has no virtual stages: a list for them is none for it."""
    return rule if isinstance(rule, str) or len(rule) == ranks else "cost"


def _of_stages(costs: Sequence[int], split: Sequence[int]) -> list[int]:
    starts = [sum(split[:stage]) for stage in range(len(split))]
    return [sum(costs[start : start + layers]) for start, layers in zip(starts, split, strict=True)]
