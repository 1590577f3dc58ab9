"""How the layers of a model are dealt out to pipeline stages."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture, layer_cost, output_cost
from minitron_megatron.errors import LayoutError


def split_layers(arch: Architecture, stages: int, rule: str = "cost") -> tuple[int, ...]:
    """Layers of each pipeline stage, the first stage first.

    rule "even": equal numbers, the remainder on the first stages. rule "cost": the largest cost of a stage is as small as
    possible; the last stage also carries the output layer. A pruned depth rarely divides, so neither rule asks that it does.
    """
    if stages > arch.layers:
        raise LayoutError(f"parallel.pipeline={stages} is more than the model's {arch.layers} layers; at most {arch.layers}")
    if rule == "even":
        return _even(arch.layers, stages)
    return _balanced(arch.layers, stages, extra_layers=output_cost(arch) / layer_cost(arch))


def _even(layers: int, stages: int) -> tuple[int, ...]:
    return tuple(layers // stages + (stage < layers % stages) for stage in range(stages))


def _balanced(layers: int, stages: int, *, extra_layers: float) -> tuple[int, ...]:
    """Tries every size of the last stage; the others are even, so each try is optimal for its last stage."""
    if stages == 1:
        return (layers,)
    candidates = [(*_even(layers - last, stages - 1), last) for last in range(1, layers - stages + 2)]
    return min(candidates, key=lambda split: (max(split[0], split[-1] + extra_layers), -split[-1]))
