"""Widths of FFNs in a target, which may differ between layers, and the layers that keep them."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.prune import Prune

Size = int | list[int]


def layer_problems(prune: Prune, source: Architecture) -> list[str]:
    """Of prune.drop_layers."""
    if prune.drop_layers is None:
        return []
    beyond = [layer for layer in prune.drop_layers if layer >= source.layers]
    if beyond:
        return [f"prune.drop_layers names layer {beyond[0]} of the source, which has layers 0 to {source.layers - 1}"]
    left = kept_layers(prune, source)
    if left < 1:
        return ["prune.drop_layers drops every layer; leave one at least"]
    if prune.target.layers not in (None, left):
        return [f"prune.target.layers={prune.target.layers}, but prune.drop_layers leaves {left} of {source.layers}; leave one of the two out"]
    return []


def kept_layers(prune: Prune, source: Architecture) -> int:
    """How many layers the pruned model has."""
    return source.layers - len(prune.drop_layers) if prune.drop_layers is not None else prune.target.layers or source.layers


def widths_in_source(prune: Prune, source: Architecture) -> list[int] | None:
    """Widths that the kept layers have in the source; None where layers differ and the scores decide which of them are kept."""
    layers = kept_layers(prune, source)
    if source.ffn_per_layer is None:
        return [source.ffn] * layers
    if prune.drop_layers is None and layers < source.layers:
        return None
    return [width for layer, width in enumerate(source.ffn_widths) if layer not in (prune.drop_layers or ())]


def width_limits(prune: Prune, source: Architecture) -> list[int]:
    """What each kept layer has in the source; where the scores decide which are kept, the narrowest layers of the source."""
    return widths_in_source(prune, source) or sorted(source.ffn_widths)[: kept_layers(prune, source)]


def width_problems(prune: Prune, ffn: Size | None, source: Architecture) -> list[str]:
    """ffn: of the target, after alignment; None: not named."""
    layers, known = kept_layers(prune, source), widths_in_source(prune, source)
    if prune.ffn_by == "global" and (not isinstance(ffn, int) or ffn >= max(source.ffn_widths) or source.experts):
        limit = f"one number below the source's {max(source.ffn_widths)}, and no experts"
        return [f"prune.ffn_by=global ranks neurons over all layers: it needs prune.target.ffn, {limit}"]
    if ffn is None:
        problem = "prune.target.ffn: the source's layers differ in width, and the scores decide which are kept; name a width, or prune.drop_layers"
        return [problem] if known is None else []
    if isinstance(ffn, list) and (len(ffn) != layers or source.experts):
        return [f"prune.target.ffn is a list of {len(ffn)}; it needs a width for each of the {layers} kept layers, which have no experts"]
    if prune.ffn_by == "global":
        return []
    room = known or [min(source.ffn_widths)] * layers  # any layer may be the one of this width
    wanted = ffn if isinstance(ffn, list) else [ffn] * layers
    return [
        f"prune.target.ffn={width} of kept layer {layer} is larger than the {most} that it has in the source"
        for layer, (width, most) in enumerate(zip(wanted, room, strict=True))
        if width > most
    ]
