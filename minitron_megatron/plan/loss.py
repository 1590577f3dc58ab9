"""Memory of the loss: the logits of a chunk of tokens, the gradients that wait for backward, and the teacher's states that wait for the student.

The chunk is the one that training/losses/memory.py would choose; the weight's gradient is one fp32 [v, D] buffer, another for each further
micro-batch whose loss is made and not yet gone back (training/kd_loss.py).
Legend: N tokens of a micro-batch, v this rank's rows of the vocabulary, D student's hidden, E teacher's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minitron_megatron.config.distill import Distill, TrainingRun
from minitron_megatron.plan.activations import FP32, Pass
from minitron_megatron.platform.kernels import block_bytes
from minitron_megatron.training.losses.memory import WHOLE_CHUNK_COPIES, tokens_of_a_chunk
from minitron_megatron.training.losses.settings import LossSettings

BLOCK_COPIES = 6
"""fp32 intermediate results of a block at one time on a CPU, as the default losses are computed: an estimate, under the 8 of losses/memory.py."""
IN_PLACE_COPIES = 1
"""The same where logits are used up in place (training/losses/in_place.py)."""


class LossMemory(NamedTuple):
    """Bytes on a rank of the student's last stage."""

    chunk: int
    """Logits of the chunks under way and what is computed from them."""
    tokens: int
    """Of a chunk."""
    states: int
    """Hidden states of the student, gathered, and their gradient's copy in the weights' type, while the loss is made."""
    weight_gradient: int
    """One fp32 buffer."""
    state_gradient: int
    """Of a micro-batch, until it goes back."""
    delivery: int
    """What hands the weight's gradient over: in the weights' type, as large as the weight."""


def loss_memory(settings: TrainingRun, run: Pass, *, teachers: int) -> LossMemory:
    """teachers: whose logits are made; none for cross-entropy alone and for stored outputs."""
    rows, arch = run.split.vocabulary_rows, run.split.arch
    in_flight = 1 if run.split.tensor == 1 else 2
    choice = loss_settings(settings)
    device = torch.device(run.kernels)
    tokens = tokens_of_a_chunk(choice, rows=rows, bytes_of_a_logit=run.width, teachers=teachers, in_flight=in_flight, device=device)
    tokens = min(tokens, run.tokens)
    logits = tokens * rows * (1 + teachers) * run.width * in_flight
    weight = rows * arch.hidden
    product = weight * run.width if run.width < FP32 else 0
    gathered = run.whole_state if run.split.sequence else 0
    return LossMemory(
        chunk=logits + max(_working(choice, run, tokens, rows, teachers), product),
        tokens=tokens,
        states=run.state + gathered,
        weight_gradient=weight * FP32,
        state_gradient=run.whole_state,
        delivery=weight * run.width,
    )


def loss_settings(settings: TrainingRun) -> LossSettings:
    """As training/student.py makes them; weights that move count as 1, they change no size."""
    memory = settings.loss_memory_mib << 20
    if not isinstance(settings, Distill):
        return LossSettings({"cross_entropy": 1.0}, chunk_tokens=settings.loss_chunk_tokens, memory_bytes=memory, has_teacher=False)
    weights: dict[str, float | Tensor] = {name: 1.0 for name in settings.loss}
    return LossSettings(weights, settings.temperature, settings.loss_chunk_tokens, memory, settings.top_k)


def _working(settings: LossSettings, run: Pass, tokens: int, rows: int, teachers: int) -> int:
    """fp32 intermediate results: of a block on a CPU, of the chunk where it is taken whole; a compiled kernel writes the gradient alone."""
    whole = tokens * rows * FP32
    if settings.takes_chunks_whole:
        return WHOLE_CHUNK_COPIES * whole
    block = block_bytes(torch.device(run.kernels))
    if block is None:
        return whole
    of_block = min(whole, max(1, block // (FP32 * rows)) * rows * FP32)
    return of_block * (IN_PLACE_COPIES if _in_place(settings, run, teachers) else BLOCK_COPIES)


def _in_place(settings: LossSettings, run: Pass, teachers: int) -> bool:
    """training/losses/in_place.py, serves."""
    return list(settings.objective) == ["forward_kl"] and settings.temperature == 1 and teachers == 1 and run.width == FP32


def handover_bytes(run: Pass, micro_batches: int, states: int, *, sharded: int = 1) -> int:
    """Teacher's states of a step on one rank. run: the teacher's passes; micro_batches: of this rank; states: for each, the final one included;
    sharded: over how many tensor ranks a state is dealt out."""
    return micro_batches * states * -(-run.whole_state // sharded)
