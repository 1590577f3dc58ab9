"""Where hidden states arise in a chunk of a model, and hooks that collect a teacher's.

Legend: S this rank's tokens of a sample, B samples of a micro-batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from minitron_megatron.distill.hidden.map import EMBEDDING, StateName, layer_state
from minitron_megatron.model.gpt import HiddenStateGPT
from minitron_megatron.model.normed import See, attention_norm, on_state


def state_modules(chunk: HiddenStateGPT) -> dict[StateName, nn.Module]:
    """The module at which each state of this chunk arises: model/normed.py reads it there."""
    found: dict[StateName, nn.Module] = {EMBEDDING: chunk.embedding} if chunk.pre_process else {}
    # megatron counts layers from 1
    return found | {layer_state(layer.layer_number - 1): attention_norm(layer) for layer in chunk.decoder.layers}


class StateCapture:
    """Collects the wanted states of one micro-batch that arise in these chunks of a frozen teacher."""

    def __init__(self, chunks: Iterable[HiddenStateGPT], wanted: Iterable[StateName]) -> None:
        modules = {name: module for chunk in chunks for name, module in state_modules(chunk).items()}
        self.names = [name for name in dict.fromkeys(wanted) if name in modules]
        """Those of the wanted states that arise here."""
        self._found: dict[StateName, Tensor] = {}
        self._handles = [on_state(modules[name], self._collect(name)) for name in self.names]

    def take(self) -> dict[StateName, Tensor]:
        """[S, B, D] by name: what has come up since the last call; under sequence parallelism this rank's part of S."""
        found, self._found = self._found, {}
        return found

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _collect(self, name: StateName) -> See:
        def see(state: Callable[[], Tensor], handed_on: Tensor) -> None:
            self._found[name] = state().detach()

        return see
