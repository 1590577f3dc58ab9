"""Log-likelihoods of continuations through a model's pipeline.

Legend: B sequences of a batch, S padded length, D hidden, n continuation tokens of a batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.data.batches import Batch
from minitron_megatron.model.divergence import global_argmax, label_logits, log_normalisers
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.logits import real_logits
from minitron_megatron.model.run import forward_only
from minitron_megatron.model.sequence import whole_sequence
from minitron_megatron.parallel.collectives import sum_over

Request = tuple[list[int], list[int]]
"""Tokens of the context, tokens of the continuation."""
BATCH_TOKENS = 1024


def loglikelihoods(model: StageModel, requests: list[Request]) -> list[tuple[float, bool]]:
    """Of each request, the sum of the continuation's log-probabilities in nats and whether it is the greedy one.

    Every process of the model calls this with the same requests and gets the same answer.
    """
    layout, device = model.layout, next(model.parameters()).device
    order = sorted(range(len(requests)), key=lambda place: -len(requests[place][0]) - len(requests[place][1]))
    mine = _groups(order, requests)[layout.data_rank :: layout.data]
    answers = torch.zeros(len(requests), 2, dtype=torch.float64, device=device)
    batches = [_batch(group, requests, layout.tensor).to(device) for group in mine]

    def consume(hidden: Tensor, batch: Batch) -> None:
        whole = whole_sequence(hidden, model.layout)  # a collective: every tensor rank takes part
        values = _score(model, whole, batch)
        if layout.tensor_rank == 0:
            answers[batch.sample_ids_B] = values

    forward_only(model, batches, consume=consume)
    dist.all_reduce(answers)
    return [(total, wrong == 0) for total, wrong in answers.tolist()]


def _score(model: StageModel, hidden_SBD: Tensor, batch: Batch) -> Tensor:
    """[B, 2] fp64: sum of log-probabilities of the tokens that count, number of them that are not the greedy choice."""
    group = model.layout.groups.tp
    counts_SB = batch.loss_mask_BS.t().bool()
    labels_n = batch.labels_BS.t()[counts_SB]
    logits_nv = real_logits(model, hidden_SBD[counts_SB])
    label = sum_over(label_logits(logits_nv, labels_n, first_row=model.first_row()), group)
    log_probability_n = label - log_normalisers(logits_nv, group)
    wrong_n = global_argmax(logits_nv, first_row=model.first_row(), group=group) != labels_n
    sequence_n = counts_SB.nonzero()[:, 1]
    values = torch.zeros(counts_SB.shape[1], 2, dtype=torch.float64, device=hidden_SBD.device)
    return values.index_add_(0, sequence_n, torch.stack([log_probability_n, wrong_n], dim=-1).double())


def _groups(order: list[int], requests: list[Request]) -> list[list[int]]:
    """Requests of similar length together, at most BATCH_TOKENS padded tokens in a group; longest first."""
    groups: list[list[int]] = []
    width = 0
    for place in order:
        length = len(requests[place][0]) + len(requests[place][1])
        if not groups or width * (len(groups[-1]) + 1) > BATCH_TOKENS:
            groups.append([])
            width = length
        groups[-1].append(place)
    return groups


def _batch(group: list[int], requests: list[Request], multiple: int) -> Batch:
    """Padded on the right, where causal attention keeps it from changing anything; the length is a multiple of the tensor ranks."""
    longest = max(len(context) + len(continuation) for context, continuation in (requests[place] for place in group)) - 1
    width = -(-longest // multiple) * multiple
    tokens = torch.zeros(len(group), width, dtype=torch.int64)
    labels, mask = torch.zeros_like(tokens), torch.zeros(len(group), width)
    for row, place in enumerate(group):
        context, continuation = requests[place]
        whole = torch.tensor(context + continuation)
        tokens[row, : len(whole) - 1], labels[row, : len(whole) - 1] = whole[:-1], whole[1:]
        mask[row, len(context) - 1 : len(whole) - 1] = 1
    positions = torch.arange(width).expand_as(tokens).contiguous()
    return Batch(tokens, labels, mask, positions, torch.tensor(group))
