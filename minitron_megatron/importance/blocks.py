"""Block Influence of contiguous blocks of layers, in the same pass (P2 section 2.2): cos(what enters the first layer, what leaves the last).

A block may begin on an earlier pipeline stage than the one that holds its last layer. What entered it then travels forward from stage to
stage: each stage sends the next one, for every micro-batch, all states that blocks behind the border ask for, in one tensor, and each state
crosses a border once. The message is sent inside the forward pass, ahead of megatron's own of the same micro-batch, so whoever waits
for it waits for something that is under way. Virtual stages go through micro-batches in one order on every rank, so messages between two
ranks arrive in the order of their receives.

Legend: S this rank's tokens of a sample, B samples, D hidden, n states. State i is the input of layer i; state L leaves the last layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from minitron_megatron.importance.hooks import MicroBatchSums
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.scores.statistics import influence_axis


class Blocks(NamedTuple):
    """Numbers of layers in a block, and the group in which their inputs travel."""

    sizes: tuple[int, ...] = ()
    group: dist.ProcessGroup | None = None


NO_BLOCKS = Blocks()


def make_blocks(sizes: Sequence[int], layout: Layout) -> Blocks:
    """Every process calls this: states of a pipeline get a group of their own, since megatron's is in use when they travel."""
    if not sizes or layout.pipeline == 1:
        return Blocks(tuple(sizes))
    group = dist.new_group(timeout=layout.timeout)
    # NCCL connects a group at its first use, and waits for all its ranks then: not in the middle of a pipeline
    dist.barrier(group=group)
    return Blocks(tuple(sizes), group)


def crossing(border: int, sizes: Sequence[int], layers: int) -> list[int]:
    """States from below layer `border` that blocks ask for which end behind it; state `border` itself is the next stage's input."""
    return [state for state in range(border) if any(border < state + size <= layers for size in sizes)]


@contextmanager
def collecting_blocks(model: StageModel, blocks: Blocks, found: MicroBatchSums) -> Iterator[None]:
    """Hooks on this process's layers that add the blocks' cosines to `found` while the context is open."""
    link = _Link(model.layout, blocks.group)
    handles = []
    for number, chunk in enumerate(model.chunks if blocks.sizes else []):
        states = _ChunkStates(model, number, blocks.sizes, link, found)
        handles += [layer.register_forward_hook(states.see, with_kwargs=True) for layer in chunk.decoder.layers]
    try:
        yield
        link.finish()
    finally:
        for handle in handles:
            handle.remove()


class _Link:
    """Messages to the next stage's rank and from the one before."""

    def __init__(self, layout: Layout, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._next, self._before = (
            layout.rank_of(layout.place._replace(stage=(layout.stage + step) % layout.pipeline))
            for step in (1, -1)  # a ring: the last rank's next virtual stage is on the first one
        )
        self._under_way: deque[tuple[list[Any], Tensor]] = deque()
        self._most = 2 * layout.pipeline

    def send(self, states_nSBD: Tensor) -> None:
        """Does not wait for this message, but for older ones, which bounds what is kept of them."""
        operation = dist.P2POp(dist.isend, states_nSBD, self._next, self._group)
        self._under_way.append((dist.batch_isend_irecv([operation]), states_nSBD))
        while len(self._under_way) > self._most:
            self._wait_for_oldest()

    def receive(self, into_nSBD: Tensor) -> Tensor:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.irecv, into_nSBD, self._before, self._group)]):
            work.wait()
        return into_nSBD

    def finish(self) -> None:
        while self._under_way:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        works, _ = self._under_way.popleft()
        for work in works:
            work.wait()


class _ChunkStates:
    """States of the micro-batch that is on its way through one chunk, as long as a block asks for them."""

    def __init__(self, model: StageModel, chunk: int, sizes: tuple[int, ...], link: _Link, found: MicroBatchSums) -> None:
        numbers = [layer.layer_number - 1 for layer in model.chunks[chunk].decoder.layers]  # megatron counts from 1
        layers = model.architecture.layers
        self._first, self._last, self._sizes = numbers[0], numbers[-1], sizes
        self._arriving, self._leaving = crossing(self._first, sizes, layers), crossing(self._last + 1, sizes, layers)
        self._link, self._found = link, found
        self._states: dict[int, Tensor] = {}

    def see(self, layer: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any], output: Any) -> None:
        """A layer's forward hook."""
        number: int = layer.layer_number - 1  # type: ignore[assignment, operator]
        before = (inputs[0] if inputs else keywords["hidden_states"]).detach()
        after = (output[0] if isinstance(output, tuple) else output).detach()
        if number == self._first:
            self._begin(before)
        self._compare(number + 1, after)
        if number == self._last:
            self._end()

    def _begin(self, input_SBD: Tensor) -> None:
        self._states = {self._first: input_SBD}
        if self._arriving:
            arrived = self._link.receive(input_SBD.new_empty(len(self._arriving), *input_SBD.shape))
            self._states |= dict(zip(self._arriving, arrived, strict=True))

    def _compare(self, end: int, output_SBD: Tensor) -> None:
        for size in self._sizes:
            first = end - size
            if first >= 0:
                cosine_SB = F.cosine_similarity(self._states[first].float(), output_SBD.float(), dim=-1)
                self._found.cosine_sums[first, influence_axis(size)] = cosine_SB.sum(0)
        self._states[end] = output_SBD
        self._states.pop(end - max(self._sizes), None)  # no later block begins there

    def _end(self) -> None:
        if self._leaving:
            self._link.send(torch.stack([self._states[state] for state in self._leaving]))
        self._states = {}
