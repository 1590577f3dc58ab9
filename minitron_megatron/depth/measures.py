"""LM loss and logit error of a model on packed samples, sample by sample and in one pass; layers are left out around it.

Legend: S sequence, s this rank's part of it under sequence parallelism, B samples of a micro-batch, N all samples, D hidden, V vocabulary,
v this rank's rows of it, n tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.data.batches import FILLING, Batch, TokenDataset, collate
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.likelihood import negative_log_likelihood
from minitron_megatron.model.run import forward_only
from minitron_megatron.model.sequence import whole_sequence
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.parallel.layout import Layout

CHUNK_TOKENS = 1024
CHUNK_ROWS = 8192
"""Of the vocabulary."""


def batches_of_rank(dataset: TokenDataset, samples: int, micro_batch: int, layout: Layout, device: torch.device) -> list[Batch]:
    """Micro-batches of samples 0 … samples − 1 dealt round to the data-parallel ranks; all of one shape, the last one filled up."""
    groups = [list(range(first, min(first + micro_batch, samples))) for first in range(0, samples, micro_batch)]
    return [_filled(dataset, ids, micro_batch).to(device) for ids in groups[layout.data_rank :: layout.data]]


def _filled(dataset: TokenDataset, ids: list[int], size: int) -> Batch:
    missing = size - len(ids)
    batch = collate(dataset, [*ids, *ids[:1] * missing])
    return replace(batch, sample_ids_B=torch.tensor([*ids, *[FILLING] * missing]))


class LmLoss:
    """Negative log-likelihood and number of tokens of each sample: perplexity is exp of their ratio (P1 section 2.2)."""

    def __init__(self, model: StageModel, batches: list[Batch], samples: int) -> None:
        self._model, self._batches, self._samples = model, batches, samples

    def __call__(self) -> Tensor:
        """[N, 2] fp64, equal on every process."""
        sums_N2 = _no_sums(self._model, self._samples)

        def consume(hidden_sBD: Tensor, batch: Batch) -> None:
            hidden_SBD = whole_sequence(hidden_sBD, self._model.layout)
            for place, sample in _real_samples(batch):
                sums_N2[sample, 0] = negative_log_likelihood(self._model, hidden_SBD[:, place], batch.labels_BS[place])
                sums_N2[sample, 1] = len(hidden_SBD)

        forward_only(self._model, self._batches, consume=consume)
        return _shared(sums_N2, self._model.layout)


class LogitError:
    """Squared difference of the final logits to the full model's, and the squared logits of the full model, of each sample.

    Normalised mean squared error (arXiv 2511.16664) is their ratio. Logits are linear in the final hidden states h, and Σ over the
    vocabulary of (W h)² = hᵀ G h with G = Wᵀ W [D, D]: no logit is ever made, which saves V / D of the work; fp64, because G squares W's
    condition. Kept are the full model's final hidden states and G.
    """

    def __init__(self, model: StageModel, batches: list[Batch], samples: int, *, device_bytes: float) -> None:
        """Runs the full model once. device_bytes: hidden states beyond it wait in host memory."""
        self._model, self._batches, self._samples = model, batches, samples
        self._gram_DD = gram_of_output(model) if model.layout.is_last_stage else torch.empty(0)
        self._full: dict[tuple[int, ...], Tensor] = {}
        self._squares_N = _no_sums(model, samples)[:, 0]
        place = next(model.parameters()).device if self._state_bytes() <= device_bytes else torch.device("cpu")

        def consume(hidden_sBD: Tensor, batch: Batch) -> None:
            self._full[tuple(batch.sample_ids_B.tolist())] = hidden_sBD.detach().to(place)
            self._add_squares(self._squares_N, hidden_sBD, batch)

        forward_only(model, batches, consume=consume)

    def __call__(self) -> Tensor:
        """[N, 2] fp64, equal on every process."""
        sums_N2 = _no_sums(self._model, self._samples)
        sums_N2[:, 1] = self._squares_N

        def consume(hidden_sBD: Tensor, batch: Batch) -> None:
            full_sBD = self._full[tuple(batch.sample_ids_B.tolist())].to(hidden_sBD.device, non_blocking=True)
            self._add_squares(sums_N2[:, 0], hidden_sBD.double() - full_sBD.double(), batch)

        forward_only(self._model, self._batches, consume=consume)
        return _shared(sums_N2, self._model.layout)

    def _add_squares(self, sums_N: Tensor, states_sBD: Tensor, batch: Batch) -> None:
        """Squared logits of each sample, complete over its sequence."""
        totals_B = torch.stack([self._squared_logits(states_sBD[:, place]) for place in range(states_sBD.shape[1])])
        if self._model.layout.sequence_parallel:
            totals_B = sum_over(totals_B, self._model.layout.groups.tp)
        for place, sample in _real_samples(batch):
            sums_N[sample] = totals_B[place]

    def _squared_logits(self, states_sD: Tensor) -> Tensor:
        parts = [((some_nD @ self._gram_DD) * some_nD).sum() for some_nD in (part.double() for part in states_sD.split(CHUNK_TOKENS))]
        return torch.stack(parts).sum()

    def _state_bytes(self) -> int:
        parts = self._model.layout.tensor if self._model.layout.sequence_parallel else 1
        tokens = sum(batch.tokens_BS.numel() for batch in self._batches) // parts
        return tokens * self._model.architecture.hidden * next(self._model.parameters()).element_size()


def gram_of_output(model: StageModel) -> Tensor:
    """[D, D] fp64 Wᵀ W of the output weight's real rows, over all tensor ranks; on the last stage."""
    weight_vD = model.output_weight()
    if weight_vD is None:
        raise RuntimeError("the output weight is on the last stage only")
    gram_DD = torch.zeros(weight_vD.shape[1], weight_vD.shape[1], dtype=torch.float64, device=weight_vD.device)
    for rows_vD in weight_vD.detach()[: model.valid_rows()].split(CHUNK_ROWS):
        rows = rows_vD.double()
        gram_DD += rows.t() @ rows
    return sum_over(gram_DD, model.layout.groups.tp)


def _real_samples(batch: Batch) -> list[tuple[int, int]]:
    """Place in the micro-batch, sample id."""
    return [(place, sample) for place, sample in enumerate(batch.sample_ids_B.tolist()) if sample != FILLING]


def _no_sums(model: StageModel, samples: int) -> Tensor:
    return torch.zeros(samples, 2, dtype=torch.float64, device=next(model.parameters()).device)


def _shared(sums_N2: Tensor, layout: Layout) -> Tensor:
    """One rank speaks for each sample: the first tensor rank of the last stage, of the data-parallel rank that has it."""
    if not layout.is_last_stage or layout.tensor_rank > 0:
        sums_N2.zero_()
    dist.all_reduce(sums_N2)
    return sums_N2
