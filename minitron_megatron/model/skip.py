"""Layers left out in memory: no new checkpoint, and nothing of megatron's is rebound."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from minitron_megatron.model.gpt import StageModel


class SkippedLayer(nn.Module):
    """Stands in a block's list of layers for one that is left out: hidden states and context leave as they came."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number
        """Over the whole model, from 1, as megatron counts."""

    def forward(self, hidden_states: Tensor, *_: Any, context: Tensor | None = None, **__: Any) -> tuple[Tensor, Tensor | None]:
        return hidden_states, context


@contextmanager
def without_layers(model: StageModel, layers: Collection[int]) -> Iterator[None]:
    """While the context is open the model runs without these layers, numbered over the whole model from 0; each process names all of them.

    Raises ValueError for a layer that the model does not have. Modules in their place hold no parameters, so open it for forward passes only.
    """
    beyond = [layer for layer in layers if not 0 <= layer < model.architecture.layers]
    if beyond:
        raise ValueError(f"layers {beyond} are not in a model of {model.architecture.layers}")
    replaced: list[tuple[nn.ModuleList, int, nn.Module]] = []
    try:
        for chunk in model.chunks:
            for place, layer in enumerate(chunk.decoder.layers):
                if layer.layer_number - 1 in layers:
                    replaced.append((chunk.decoder.layers, place, layer))
                    chunk.decoder.layers[place] = SkippedLayer(layer.layer_number)
        yield
    finally:
        for held, place, layer in replaced:
            held[place] = layer
