"""Hidden states of the teacher → what is stored of each token, a chunk of logits at a time, over a vocabulary sharded by tensor parallelism.

Legend: n tokens of a chunk, N of a sample, v this rank's rows of the vocabulary, V all of them, K classes, R draws, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minitron_megatron.config.teacher_logits import TeacherLogits
from minitron_megatron.model.divergence import Softmax, shard_sums
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.logits import real_logits
from minitron_megatron.model.sampling import whole_logits
from minitron_megatron.parallel.collectives import gather_first
from minitron_megatron.stored.records import Record, SampleRecord, TopKRecord
from minitron_megatron.training.losses.terms import Shard
from minitron_megatron.training.losses.top_k import candidates, live

LOWEST = -60000.0
"""Log-probabilities are not stored below it: float16 would call them −∞."""


def sample_record(model: StageModel, hidden_ND: Tensor, settings: TeacherLogits, draws_key: Sequence[int]) -> Record:
    """One sample's record, on the CPU; every tensor rank of the last stage calls this. draws_key: what a sample's draws follow from."""
    if settings.kind == "top_k":
        return _top_k_record(model, hidden_ND, settings)
    places_NR = torch.from_numpy(np.random.default_rng(draws_key).random((len(hidden_ND), settings.draws))).to(hidden_ND.device)
    return _drawn_record(model, hidden_ND, settings, places_NR)


def _top_k_record(model: StageModel, hidden_ND: Tensor, settings: TeacherLogits) -> TopKRecord:
    shard, parts = Shard(model.first_row(), model.layout.groups.tp), []
    for hidden_nD in hidden_ND.split(settings.chunk_tokens):
        logits_nv = real_logits(model, hidden_nD).div_(settings.temperature)
        peaks, norms, *found = gather_first(
            torch.cat([shard_sums(logits_nv), candidates(logits_nv, logits_nv, shard, k=settings.k)], -1), shard.group
        ).split([1, 1, 2 * settings.k + 2], dim=-1)
        teacher = Softmax.of(logits_nv, peaks[..., 0], norms[..., 0])
        ids_nK, log_probs_nK, log_tail_n = live(teacher, found[0], k=settings.k)
        parts.append((ids_nK.int().cpu(), log_probs_nK.clamp_min(LOWEST).cpu(), log_tail_n.cpu()))
    return TopKRecord(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _drawn_record(model: StageModel, hidden_ND: Tensor, settings: TeacherLogits, places_NR: Tensor) -> SampleRecord:
    drawn, entropies = [], []
    for hidden_nD, places_nR in zip(hidden_ND.split(settings.chunk_tokens), places_NR.split(settings.chunk_tokens), strict=True):
        log_q_nV = (whole_logits(model, hidden_nD).double() / settings.temperature).log_softmax(-1)
        drawn.append(drawn_tokens(log_q_nV, places_nR).cpu())
        entropies.append(-torch.xlogy(log_q_nV.exp(), log_q_nV.exp()).sum(-1).float().cpu())
    return SampleRecord(*counted(torch.cat(drawn)), torch.cat(entropies))


def drawn_tokens(log_q_nV: Tensor, places_nR: Tensor) -> Tensor:
    """[n, R] token ids: places in [0, 1) on the line of cumulated probabilities, in fp64: another layout's rounding moves hardly any border."""
    upto_nV = log_q_nV.exp().cumsum(-1)
    found = torch.searchsorted(upto_nV, places_nR * upto_nV[:, -1:], right=True)
    return found.clamp_max(log_q_nV.shape[-1] - 1)


def counted(ids_NR: Tensor) -> tuple[Tensor, Tensor]:
    """The different tokens of each place, in order of their ids, and how often each came, 0 behind the last: [N, U] int32."""
    ordered = ids_NR.sort(-1).values.numpy()
    first = np.concatenate([np.ones((len(ordered), 1), bool), np.diff(ordered, axis=-1) != 0], axis=-1)
    counts = np.diff(np.append(np.flatnonzero(first), first.size))
    present = np.arange(first.sum(-1).max()) < first.sum(-1)[:, None]
    found = []
    for values in (ordered[first], counts):
        table = np.zeros(present.shape, dtype=np.int32)
        table[present] = values
        found.append(torch.from_numpy(table))
    return found[0], found[1]
