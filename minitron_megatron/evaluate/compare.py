"""Perplexity, KL to the teacher and top-1 agreement of several models on the same windows.

Legend: W windows, N tokens of a window, n of a chunk, v this rank's rows of the vocabulary, D hidden.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.data.batches import Batch, TokenDataset, collate
from minitron_megatron.model.divergence import divergence, global_argmax, label_logits, log_normalisers
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.logits import real_logits
from minitron_megatron.model.run import forward_only
from minitron_megatron.model.sequence import whole_sequence
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.parallel.world import World
from minitron_megatron.progress import progress

WINDOWS_AT_A_TIME = 8
"""Their hidden states are in memory together, of all models."""
CHUNK_TOKENS = 256

Figure = dict[str, float]


class WindowSums(NamedTuple):
    """Sums over the tokens of one window: negative log-likelihood, KL(teacher ‖ model), equal top-1 tokens."""

    nll: Tensor
    kl: Tensor
    agreed: Tensor


def compare(models: dict[str, StageModel], windows: TokenDataset, world: World, *, what: str) -> dict[str, Tensor]:
    """[W, 3] per model, WindowSums of every window, fp64 and equal on every process; the first model is the teacher."""
    layout = next(iter(models.values())).layout
    sums = {name: torch.zeros(len(windows), 3, dtype=torch.float64, device=world.platform.device) for name in models}
    ids = list(range(layout.data_rank, len(windows), layout.data))
    most = -(-len(windows) // layout.data)  # every rank takes part in every round, with windows or without: experts may be shared
    rounds = [ids[start : start + WINDOWS_AT_A_TIME] for start in range(0, most, WINDOWS_AT_A_TIME)]
    with progress(f"evaluate {what}", len(rounds), world) as advance:
        for some in rounds:
            batches = [collate(windows, [window]).to(world.platform.device) for window in some]
            hidden = {name: forward_only(model, batches) for name, model in models.items()}
            if layout.is_last_stage:
                for place, batch in enumerate(batches):
                    found = _window({name: hidden[name][place] for name in models}, models, batch)
                    for name, of_window in found.items():
                        sums[name][some[place]] = torch.stack(list(of_window)).double()
            advance()
    for values in sums.values():
        if not layout.is_last_stage or layout.tensor_rank > 0:
            values.zero_()  # one rank speaks for each window
        dist.all_reduce(values)
    return sums


def domain_figures(sums: dict[str, Tensor], tokens_per_window: int) -> dict[str, dict[str, Figure | None]]:
    """Perplexity, KL (nats a token) and top-1 agreement of each model with standard errors over windows."""
    teacher = next(iter(sums))
    figures: dict[str, dict[str, Figure | None]] = {}
    for name, values in sums.items():
        nll, kl, agreed = (mean_and_error(column / tokens_per_window) for column in values.unbind(-1))
        perplexity = math.exp(min(nll["value"], 700))
        figures[name] = {
            "perplexity": {"value": perplexity, "stderr": perplexity * nll["stderr"]},
            "kl": None if name == teacher else kl,
            "top1_agreement": None if name == teacher else agreed,
        }
    return figures


def mean_and_error(values: Tensor) -> Figure:
    """Mean and its standard error over independent values."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {"value": float(values.mean()), "stderr": error}


def _window(hidden: dict[str, Tensor], models: dict[str, StageModel], batch: Batch) -> dict[str, WindowSums]:
    """Chunk by chunk: the teacher's logits are made once and serve every model."""
    labels_N = batch.labels_BS.t().flatten()
    states = {name: whole_sequence(value, models[name].layout).flatten(0, 1) for name, value in hidden.items()}
    sums = {name: torch.zeros(3, device=labels_N.device) for name in models}
    for start in range(0, len(labels_N), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        for name, values in _chunk({name: state[chunk] for name, state in states.items()}, models, labels_N[chunk]).items():
            sums[name] += values
    return {name: WindowSums(*values) for name, values in sums.items()}


def _chunk(states: dict[str, Tensor], models: dict[str, StageModel], labels_n: Tensor) -> dict[str, Tensor]:
    (teacher_name, teacher), *others = models.items()
    group, first_row = teacher.layout.groups.tp, teacher.first_row()
    teacher_nv = real_logits(teacher, states[teacher_name])
    teacher_top = global_argmax(teacher_nv, first_row=first_row, group=group)
    label = sum_over(label_logits(teacher_nv, labels_n, first_row=first_row), group)
    teacher_nll = (log_normalisers(teacher_nv, group) - label).sum()
    found = {teacher_name: torch.stack([teacher_nll, teacher_nll.new_zeros(()), teacher_nll.new_tensor(len(labels_n))])}
    for name, model in others:
        logits_nv = real_logits(model, states[name])
        apart = divergence(logits_nv, teacher_nv, labels_n, first_row=first_row, group=group)
        agreed = global_argmax(logits_nv, first_row=first_row, group=group) == teacher_top
        nll = apart.student_log_norm_n - apart.label_logit_n
        found[name] = torch.stack([nll.sum(), apart.forward_kl_n.sum(), agreed.float().sum()])
    return found
