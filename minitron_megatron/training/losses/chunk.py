"""The losses of a chunk of tokens and the gradient of its logits, over a vocabulary sharded by tensor parallelism.

Legend: n tokens of a chunk, or of a block of it, v this rank's rows of the vocabulary, r tensor ranks, k numbers that a shard is reduced to.
`begin` reduces this rank's shard to some numbers a token and sends them off; one all-gather carries them for all losses and teachers.
`finish` combines them with log-sum-exp weights and puts the gradient where the student's logits were; Jensen–Shannon and top-K reduce
once more there. The others go through a chunk in blocks that stay in a CPU's cache, or as a compiled kernel on CUDA: one read and one write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from minitron_megatron.model.divergence import Softmax, crossed_sums, forward_kl, label_logits, log_normaliser, shard_sums
from minitron_megatron.parallel.collectives import Gathering, begin_gather_first
from minitron_megatron.platform.kernels import block_bytes, elementwise
from minitron_megatron.training.losses import in_place
from minitron_megatron.training.losses.logits import Chunk
from minitron_megatron.training.losses.settings import TOP_K, LossSettings
from minitron_megatron.training.losses.terms import TERMS, Shard, Term, probabilities
from minitron_megatron.training.losses.top_k import top_k_term


class UnderWay(NamedTuple):
    """A chunk whose sums are being gathered."""

    chunk: Chunk
    sums: Gathering
    widths: list[int]
    """How many numbers a token each part has: the student's, then for each teacher those of the KL and of each term."""


@dataclass
class _Found:
    """What the losses of a block add up to."""

    needs_grad: bool
    values: dict[str, Tensor] = field(default_factory=dict)
    gradient_nv: Tensor | None = None

    def add(self, name: str, value_n: Tensor) -> None:
        self.values[name] = self.values[name] + value_n if name in self.values else value_n

    def add_gradient(self, weight: float | Tensor, gradient: Callable[[], Tensor]) -> None:
        is_number = isinstance(weight, int | float)
        if self.needs_grad and not (is_number and weight == 0):
            part_nv = gradient() if is_number and weight == 1 else gradient().mul_(weight)
            self.gradient_nv = part_nv if self.gradient_nv is None else self.gradient_nv.add_(part_nv)


class _Student(NamedTuple):
    at_temperature: Softmax
    raw_log_norm_n: Tensor
    label_logit_n: Tensor


def begin(chunk: Chunk, settings: LossSettings, shard: Shard) -> UnderWay:
    """The chunk's first half."""
    sums, _ = _halves(chunk, settings)
    parts = [sums(chunk.of(block), settings, shard) for block in _blocks(chunk, settings)]
    sums_nk = torch.cat([torch.cat(of_block, dim=-1) for of_block in parts])
    return UnderWay(chunk, begin_gather_first(sums_nk, shard.group), [part.shape[-1] for part in parts[0]])


def finish(under_way: UnderWay, shares: Sequence[float], settings: LossSettings, shard: Shard, *, needs_grad: bool) -> Tensor:
    """[losses] the sums over tokens of settings.names, weighted by token, equal on every rank. shares: the weight of each teacher.

    With needs_grad the student's logits become the gradient of the weighted losses.
    """
    chunk, sums_rnk = under_way.chunk, under_way.sums.wait()
    (_, losses), values = _halves(chunk, settings), []
    for block in _blocks(chunk, settings):
        parts = sums_rnk[:, block].split(under_way.widths, dim=-1)
        values.append(losses(chunk.of(block), parts, shares, settings, shard, needs_grad))
    return (torch.cat(values, dim=-1) * chunk.token_weights_n).sum(-1)


def _halves(chunk: Chunk, settings: LossSettings) -> tuple[Callable[..., list[Tensor]], Callable[..., Tensor]]:
    """What is done with a block before and after the gather, as the device likes it; where a loss talks to other ranks in the middle, as it is."""
    if in_place.serves(chunk, settings):
        return in_place.sums, in_place.losses
    if settings.takes_chunks_whole:
        return _sums, _losses
    device = chunk.labels_n.device
    return elementwise(_sums, device), elementwise(_losses, device)


def _blocks(chunk: Chunk, settings: LossSettings) -> Iterator[slice]:
    """Of tokens; all at once where a loss has a reduction of its own, in which every rank takes part once a chunk."""
    tokens, rows = chunk.logits.student_nv.shape
    block = None if settings.takes_chunks_whole else block_bytes(chunk.labels_n.device)
    step = tokens if block is None else max(1, block // (4 * rows))
    return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))


def _sums(block: Chunk, settings: LossSettings, shard: Shard) -> list[Tensor]:
    """This shard's numbers: [n, k] of the student, then for each teacher those of the KL and of each term."""
    raw_nv = block.logits.student_nv.float()
    student_nv = _at(raw_nv, settings.temperature)
    parts = [_student_sums(raw_nv, student_nv, label_logits(raw_nv, block.labels_n, first_row=shard.first_row))]
    for logits_nv in block.logits.teachers_nv:
        teacher_nv = _at(logits_nv.float(), settings.temperature)
        parts += [crossed_sums(student_nv, teacher_nv), *(term.sums(student_nv, teacher_nv, shard) for term in _terms(settings).values())]
    return parts


def _losses(block: Chunk, sums: Sequence[Tensor], shares: Sequence[float], settings: LossSettings, shard: Shard, needs_grad: bool) -> Tensor:
    """[losses, n] of settings.names, before the weights of the tokens. sums: [r, n, k] in the order of _sums."""
    raw_nv = block.logits.student_nv.float()
    student_nv = _at(raw_nv, settings.temperature)
    found, student, names, rest = _Found(needs_grad), _student(student_nv, sums[0]), list(_terms(settings)), list(sums[1:])
    for logits_nv, share in zip(block.logits.teachers_nv, shares, strict=True):
        crossed, others, rest = rest[0], rest[1 : 1 + len(names)], rest[1 + len(names) :]
        teacher_nv = _at(logits_nv.float(), settings.temperature)
        _hold_against(found, student.at_temperature, teacher_nv, crossed, dict(zip(names, others, strict=True)), settings, shard, share)
    for target in block.stored:
        loss, weight = target.loss(student.at_temperature, shard), settings.objective[target.name] * target.weight
        found.add(target.name, settings.temperature**2 * target.weight * loss.value_n)
        found.add_gradient(weight * settings.temperature, loss.gradient)
    found.add("cross_entropy", student.raw_log_norm_n - student.label_logit_n)
    log_norm_n, row_n = student.raw_log_norm_n, block.labels_n - shard.first_row
    found.add_gradient(settings.objective.get("cross_entropy", 0.0), lambda: _cross_entropy_gradient(raw_nv, log_norm_n, row_n))
    if needs_grad:
        _put_gradient(found.gradient_nv, block)
    return torch.stack([found.values[name] for name in settings.names])


def _put_gradient(gradient_nv: Tensor | None, block: Chunk) -> None:
    """Where the student's logits were, in the weights' type; there is none where every loss weighs nothing at this step."""
    if gradient_nv is None:
        block.logits.student_nv.zero_()
    else:
        block.logits.student_nv.copy_(gradient_nv.mul_(block.token_weights_n[:, None]))


def _at(raw_nv: Tensor, temperature: float) -> Tensor:
    """The logits themselves where they need not change."""
    return raw_nv if temperature == 1 else raw_nv / temperature


def _terms(settings: LossSettings) -> dict[str, Term]:
    """Those of the objective that have sums of their own; KL and cross-entropy are always there."""
    known = TERMS | ({TOP_K: top_k_term(settings.top_k)} if settings.top_k else {})
    return {name: known[name] for name in settings.objective if name in known}


def _hold_against(
    found: _Found,
    student: Softmax,
    teacher_nv: Tensor,
    crossed_rn3: Tensor,
    sums: dict[str, Tensor],
    settings: LossSettings,
    shard: Shard,
    share: float,
) -> None:
    """Adds the losses against one teacher. sums: [r, n, k] of each term."""
    temperature, terms = settings.temperature, _terms(settings)
    teacher, kl_n = forward_kl(student, teacher_nv, crossed_rn3.unbind(-1))
    for name, sums_rnk in sums.items():
        loss, power = terms[name].loss(student, teacher, sums_rnk, shard), terms[name].power
        found.add(name, temperature**power * share * loss.value_n)
        found.add_gradient(settings.objective[name] * share * temperature ** (power - 1), loss.gradient)
    found.add("forward_kl", temperature**2 * share * kl_n)
    found.add_gradient(settings.objective.get("forward_kl", 0.0) * share * temperature, lambda: _kl_gradient(student, teacher))


def _student_sums(raw_nv: Tensor, student_nv: Tensor, label_logit_n: Tensor) -> Tensor:
    """[n, 3] peak, Σ exp(x − peak) and the label's logit; at another temperature than 1 both sums of the raw logits too."""
    parts = [shard_sums(student_nv), label_logit_n[:, None]]
    return torch.cat(parts if student_nv is raw_nv else [*parts, shard_sums(raw_nv)], dim=-1)


def _student(student_nv: Tensor, sums_rnk: Tensor) -> _Student:
    peaks, norms, labels, *raw = sums_rnk.unbind(-1)
    softmax = Softmax.of(student_nv, peaks, norms)
    raw_log_norm_n = log_normaliser(*raw)[0] if raw else softmax.log_norm_n
    return _Student(softmax, raw_log_norm_n, labels.sum(0))


def _kl_gradient(student: Softmax, teacher: Softmax) -> Tensor:
    """softmax(student) − softmax(teacher)"""
    return probabilities(student).sub_(probabilities(teacher))


def _cross_entropy_gradient(raw_nv: Tensor, log_norm_n: Tensor, row_n: Tensor) -> Tensor:
    """softmax − one-hot of the labels that lie in this shard."""
    gradient = (raw_nv - log_norm_n[:, None]).exp_()
    inside = (row_n >= 0) & (row_n < raw_nv.shape[-1])
    return gradient.scatter_add_(-1, row_n.clamp(0, raw_nv.shape[-1] - 1)[:, None], -inside[:, None].to(gradient.dtype))
