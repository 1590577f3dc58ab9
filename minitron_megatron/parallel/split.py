"""How the layers of a model are dealt out to pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from minitron_megatron.arch.architecture import Architecture, layer_cost, layer_costs, output_cost
from minitron_megatron.config.parallel import Rule
from minitron_megatron.errors import LayoutError


@dataclass(frozen=True)
class EndWork:
    """What a pipeline's first and last stage do beyond their layers, in the unit of one layer's work (of mean width where widths differ)."""

    first: float = 0.0
    last: float = 0.0


def hidden_state_work(arch: Architecture) -> EndWork:
    """Forward up to the final hidden states, as the importance pass and the teacher of a distillation run."""
    return EndWork(first=arch.hidden / layer_cost(arch))  # one row of the embedding a token


def logits_work(arch: Architecture) -> EndWork:
    """Forward up to the logits."""
    return EndWork(hidden_state_work(arch).first, output_cost(arch) / layer_cost(arch))


def distillation_work(student: Architecture, *teachers: Architecture) -> EndWork:
    """Training: three matrix products for each weight of the student, one more for each teacher's output layer on the same stage."""
    outputs = 3 * output_cost(student) + sum(map(output_cost, teachers))
    return EndWork(hidden_state_work(student).first, outputs / (3 * layer_cost(student)))


def layer_works(arch: Architecture) -> tuple[float, ...]:
    """[L] the work of each layer in that unit; empty where all are equal."""
    if not arch.ffn_per_layer:
        return ()
    unit = layer_cost(arch)
    return tuple(cost / unit for cost in layer_costs(arch))


def split_layers(
    layers: int, stages: int, rule: Rule = "cost", ends: EndWork = EndWork(), works: Sequence[float] = (), *, ranks: int = 0
) -> tuple[int, ...]:
    """Layers of each pipeline stage in the order of the model's depth; with a virtual pipeline, of each virtual stage.

    "even": equal numbers, the remainder on the first stages. "cost": the largest work of a stage is as small as possible, the work of
    both ends counted, and each layer's by works where they differ (layer_works). ranks: to which the stages are dealt round, by default one
    each; where each has several, it is the largest work of a rank, and only then that of a stage (of equal layers; works that differ are dealt
    to stages as if each stood alone).
    A list is for models of as many layers as it deals out; others, such as the unpruned one, are split by cost.
    A pruned depth rarely divides, so no rule asks that it does.
    Raises LayoutError for more stages than layers and for a list of another number of stages.
    """
    if stages > layers:
        raise LayoutError(f"parallel.pipeline × parallel.virtual = {stages} is more than the model's {layers} layers; at most {layers}")
    if not isinstance(rule, str) and len(rule) != stages:
        raise LayoutError(f"parallel.layers_per_stage={list(rule)} has {len(rule)} entries for {stages} stages (pipeline × virtual)")
    if not isinstance(rule, str) and sum(rule) == layers:
        return tuple(rule)
    if rule == "even":
        return _even(layers, stages)
    if works:
        return _balanced_unequal(works, stages, ends)
    return _balanced_ranks(layers, stages, ranks, ends) if 1 < ranks < stages else _balanced(layers, stages, ends)


def _even(layers: int, stages: int) -> tuple[int, ...]:
    return tuple(layers // stages + (stage < layers % stages) for stage in range(stages))


def _balanced(layers: int, stages: int, ends: EndWork) -> tuple[int, ...]:
    """Tries every size of the two ends; the stages between are even, so each try is optimal for its ends."""
    if stages == 1:
        return (layers,)
    if stages == 2:
        candidates: list[tuple[int, ...]] = [(layers - last, last) for last in range(1, layers)]
    else:
        inner = stages - 2
        ends_of = [(first, last) for first in range(1, layers) for last in range(1, layers) if layers - first - last >= inner]
        candidates = [(first, *_even(layers - first - last, inner), last) for first, last in ends_of]
    return min(candidates, key=lambda split: (_largest_work(split, ends), max(split) - min(split), -split[-1]))


def _balanced_ranks(layers: int, stages: int, ranks: int, ends: EndWork) -> tuple[int, ...]:
    """A last stage with more work than a rank's fair share leaves the other stages of its rank with less, which rules for stages alone cannot
    see: tries every size of the last stage and of the others of its rank together; what is left is even over the other ranks."""
    virtual = stages // ranks
    candidates = []
    for last in range(1, layers):
        for beside in range(virtual - 1, layers - last - (ranks - 1) * virtual + 1):
            of_ranks = [_even(part, virtual) for part in _even(layers - last - beside, ranks - 1)[::-1]]  # the embedding is on the first
            of_ranks.append((*_even(beside, virtual - 1), last))
            candidates.append(tuple(of_ranks[stage % ranks][stage // ranks] for stage in range(stages)))
    return min(candidates, key=lambda split: (_largest_rank(split, ranks, ends), _largest_work(split, ends), max(split) - min(split), -split[-1]))


def _largest_rank(split: tuple[int, ...], ranks: int, ends: EndWork) -> float:
    work = [float(sum(split[rank::ranks])) for rank in range(ranks)]
    return max(work[0] + ends.first, work[-1] + ends.last, *work[1:-1])


def _largest_work(split: tuple[int, ...], ends: EndWork) -> float:
    return max(split[0] + ends.first, split[-1] + ends.last, *split[1:-1])


def _balanced_unequal(works: Sequence[float], stages: int, ends: EndWork) -> tuple[int, ...]:
    """Every way to end a stage, from the last one forward; of equal ones the one whose earlier stages are shorter."""
    before = [0.0, *accumulate(works)]

    @cache
    def best(start: int, stage: int) -> tuple[float, tuple[int, ...]]:
        """The largest work of this stage and those behind it, which begin at layer `start`, and their layers."""
        last = stage == stages - 1
        beyond = (ends.first if stage == 0 else 0.0) + (ends.last if last else 0.0)
        if last:
            return before[-1] - before[start] + beyond, (len(works) - start,)
        found = []
        for stop in range(start + 1, len(works) - (stages - 1 - stage) + 1):
            rest, split = best(stop, stage + 1)
            found.append((max(before[stop] - before[start] + beyond, rest), (stop - start, *split)))
        return min(found)

    return best(0, 0)[1]
