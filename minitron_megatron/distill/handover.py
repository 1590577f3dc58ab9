"""Where the teacher's states wait for the student: on the device up to a budget, beyond it in pinned host memory.

Legend: S sequence, s this rank's part of it, B samples of a micro-batch, E teacher's hidden.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Held:
    """A state of one micro-batch: [S, B, E] on every tensor rank, or [s, B, E] sharded along the sequence."""

    states: Tensor
    sharded: bool


class HandoverStore:
    """States by key; each comes out once. On a CPU the host's memory is the device's, and spilling moves nothing."""

    def __init__(self, budget_bytes: float, device: torch.device) -> None:
        self._budget, self._device = budget_bytes, device
        self._on_device: dict[Hashable, Held] = {}
        self._on_host: dict[Hashable, Held] = {}
        self._coming: dict[Hashable, tuple[Held, torch.cuda.Event]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.device_bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._on_device or key in self._on_host or key in self._coming

    @property
    def host_bytes(self) -> int:
        return sum(held.states.nbytes for held in self._on_host.values())

    def put(self, key: Hashable, held: Held) -> None:
        """Takes a state in; what is beyond the budget goes to host memory."""
        if self.device_bytes + held.states.nbytes > self._budget:
            self._on_host[key] = self._spilled(held)
        else:
            self.device_bytes += held.states.nbytes
            self._on_device[key] = held

    def take(self, key: Hashable) -> Held:
        """The state, on the device; it is forgotten here, and the next one on the host starts to come back."""
        if key in self._on_device:
            held = self._on_device.pop(key)
            self.device_bytes -= held.states.nbytes
            return held
        if key in self._coming:
            held, arrived = self._coming.pop(key)
            arrived.wait()
        else:
            host = self._on_host.pop(key)
            held = replace(host, states=host.states.to(self._device, non_blocking=True))
        self._fetch_next()
        return held

    def _spilled(self, held: Held) -> Held:
        if self._stream is None:
            return held
        host = torch.empty(held.states.shape, dtype=held.states.dtype, pin_memory=True)
        return replace(held, states=host.copy_(held.states, non_blocking=True))

    def _fetch_next(self) -> None:
        """One micro-batch ahead, on a stream of its own, so that it travels beside the student's work."""
        if self._stream is None or self._coming or not self._on_host:
            return
        key = next(iter(self._on_host))
        held, current = self._on_host.pop(key), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            moved = held.states.to(self._device, non_blocking=True)
        moved.record_stream(current)
        self._coming[key] = replace(held, states=moved), self._stream.record_event()
