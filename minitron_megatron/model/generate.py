"""Continues texts, token by token, through a model's pipeline, in batches and under any layout without virtual stages.

megatron-core's static inference context keeps keys and values of each layer, so that a step computes one token a text. Under sequence
parallelism one token cannot be shared out: there every step computes the whole text again.

Legend: n texts, P tokens of a prompt, L of prompt and continuation, B texts of a micro-batch, S tokens of a step, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from minitron_megatron.data.batches import Batch, of_data_rank
from minitron_megatron.model.divergence import global_argmax
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.logits import real_logits
from minitron_megatron.model.run import forward_only
from minitron_megatron.model.sampling import Sampling, sampled_tokens, whole_logits
from minitron_megatron.model.sequence import whole_sequence

GREEDY = Sampling()


def generate(
    model: StageModel,
    prompts_nP: Tensor,
    *,
    new_tokens: int,
    eod: int,
    micro_batch: int = 1,
    sampling: Sampling = GREEDY,
    sample_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """What follows each prompt: at most new_tokens ids, ended by eod where the model ends the text.

    prompts_nP: [n, P] int64; sample_ids: of each prompt, its draws depend on it (default: 0, 1, …). Every process of the model calls this
    with the same prompts and gets the same answer; the model takes variable lengths. At one time as many texts are under way as keep every
    pipeline stage busy: micro_batch × pipeline × data.
    """
    layout = model.layout
    draws = sampling.draws(range(len(prompts_nP)) if sample_ids is None else sample_ids, new_tokens)
    at_a_time = micro_batch * layout.pipeline * layout.data
    found: list[list[int]] = []
    for start in range(0, len(prompts_nP), at_a_time):
        part = slice(start, start + at_a_time)
        texts_nL = _Writing(model, prompts_nP[part], draws[part], new_tokens, eod, micro_batch, sampling).to_the_end()
        found += [_upto(eod, row) for row in texts_nL[:, prompts_nP.shape[1] :].tolist()]
    return found


def _upto(eod: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(eod) + 1] if eod in ids else ids


class _Writing:
    """Texts that are under way together: whole on every process, each computed by one data-parallel rank."""

    def __init__(
        self, model: StageModel, prompts_nP: Tensor, draws_nN: Tensor, new_tokens: int, eod: int, micro_batch: int, sampling: Sampling
    ) -> None:
        layout, device = model.layout, next(model.parameters()).device
        self._model, self._sampling, self._eod = model, sampling, eod
        self._written = prompts_nP.shape[1]
        self._first_new = self._written
        self._texts_nL = torch.cat([prompts_nP, prompts_nP.new_full((len(prompts_nP), new_tokens), eod)], dim=1).to(device)
        self._draws_nN = draws_nN.to(device)
        rows = list(range(len(prompts_nP)))
        groups = [tuple(rows[start : start + micro_batch]) for start in range(0, len(rows), micro_batch)]
        self._mine = of_data_rank(groups, layout.data_rank, layout.data)
        self._caches = {} if layout.sequence_parallel else {group[0]: self._empty_cache(len(group)) for group in self._mine}
        self._cached = 0
        """Tokens of each text whose keys and values are kept."""

    def to_the_end(self) -> Tensor:
        """[n, L]; behind the end of a text stands eod."""
        ended_n = torch.zeros(len(self._texts_nL), dtype=torch.bool, device=self._texts_nL.device)
        while self._written < self._texts_nL.shape[1] and not ended_n.all():
            chosen_n = self._step()
            self._texts_nL[~ended_n, self._written] = chosen_n[~ended_n]
            ended_n |= chosen_n == self._eod
            self._written += 1
        return self._texts_nL

    def _step(self) -> Tensor:
        """[n] the next token of every text; the tensor ranks of a last stage choose the same, one of them speaks."""
        layout, chosen_n = self._model.layout, torch.zeros_like(self._texts_nL[:, 0])
        newest = self._written - self._cached - 1

        def consume(hidden_SBD: Tensor, batch: Batch) -> None:
            last_BD = whole_sequence(hidden_SBD, layout)[newest]  # a collective: every tensor rank takes part
            tokens_B = self._choose(last_BD, batch.sample_ids_B)
            if layout.tensor_rank == 0:
                chosen_n[batch.sample_ids_B] = tokens_B

        forward_only(self._model, [self._batch(group) for group in self._mine], consume=consume, arguments=self._arguments)
        self._keep()
        dist.all_reduce(chosen_n)
        return chosen_n

    def _choose(self, last_BD: Tensor, rows_B: Tensor) -> Tensor:
        if self._sampling.is_greedy:
            first_row, group = self._model.first_row(), self._model.layout.groups.tp
            return global_argmax(real_logits(self._model, last_BD), first_row=first_row, group=group)
        return sampled_tokens(whole_logits(self._model, last_BD), self._draws_nN[rows_B, self._written - self._first_new], self._sampling)

    def _batch(self, rows: tuple[int, ...]) -> Batch:
        """The tokens that are not cached; padded on the right to a multiple of the tensor ranks where these share the sequence."""
        tokens_BS = self._texts_nL[list(rows), self._cached : self._written]
        if self._model.layout.sequence_parallel:
            padding = -tokens_BS.shape[1] % self._model.layout.tensor
            tokens_BS = torch.nn.functional.pad(tokens_BS, (0, padding))
        positions_BS = torch.arange(self._cached, self._cached + tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS).contiguous()
        nothing_BS = torch.zeros_like(tokens_BS)
        return Batch(tokens_BS.contiguous(), nothing_BS, nothing_BS.float(), positions_BS, torch.tensor(rows, device=tokens_BS.device))

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        return {"inference_context": self._caches[int(batch.sample_ids_B[0])]} if self._caches else {}

    def _empty_cache(self, texts: int) -> StaticInferenceContext:
        return StaticInferenceContext(max_batch_size=texts, max_sequence_length=self._texts_nL.shape[1])

    def _keep(self) -> None:
        if self._model.layout.sequence_parallel:
            return
        self._cached = self._written
        for cache in self._caches.values():
            cache.sequence_len_offset = self._cached
            cache.enable_decode_mode()
