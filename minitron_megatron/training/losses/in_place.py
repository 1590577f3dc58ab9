"""Forward KL to one teacher at temperature 1, the default, in the fewest passes over the logits, in their own memory; for fp32 on a CPU.

Logits become exp(x − peak) where they lie, once: both the sums and the gradient are made of that. A compiled kernel would have to write them
for it, and bf16 would round them, so that there chunk.py's own halves are used. Legend: n tokens of a block, v this rank's rows, r ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minitron_megatron.model.divergence import Softmax, forward_kl, label_logits
from minitron_megatron.training.losses.logits import Chunk
from minitron_megatron.training.losses.settings import LossSettings
from minitron_megatron.training.losses.terms import Shard


def serves(chunk: Chunk, settings: LossSettings) -> bool:
    """Whether this is the case that is spoken of above."""
    logits = chunk.logits
    is_default = list(settings.objective) == ["forward_kl"] and settings.temperature == 1 and len(logits.teachers_nv) == 1
    return is_default and all(x.dtype == torch.float32 and x.device.type == "cpu" for x in (logits.student_nv, logits.teachers_nv[0]))


def sums(block: Chunk, settings: LossSettings, shard: Shard) -> list[Tensor]:
    """The same numbers as chunk.py's."""
    student_nv, [teacher_nv] = block.logits
    label_n = label_logits(student_nv, block.labels_n, first_row=shard.first_row)
    difference_nv = teacher_nv - student_nv
    of_student, of_teacher = _exponentials(student_nv), _exponentials(teacher_nv)
    crossed_n = difference_nv.mul_(teacher_nv).sum(-1)
    return [torch.stack([*of_student, label_n], dim=-1), torch.stack([*of_teacher, crossed_n], dim=-1)]


def losses(block: Chunk, sums: Sequence[Tensor], shares: Sequence[float], settings: LossSettings, shard: Shard, needs_grad: bool) -> Tensor:
    """As chunk.py's."""
    (student_nv, [teacher_nv]), [share] = block.logits, shares
    peaks, norms, labels = sums[0].unbind(-1)
    student = Softmax.of(student_nv, peaks, norms)
    teacher, kl_n = forward_kl(student, teacher_nv, sums[1].unbind(-1))
    if needs_grad:
        weight_n = settings.objective["forward_kl"] * share * block.token_weights_n
        of_student, of_teacher = ((weight_n * x.weights_rn[shard.group.rank()] / x.norm_n)[:, None] for x in (student, teacher))
        student_nv.mul_(of_student).addcmul_(teacher_nv, of_teacher, value=-1)
    return torch.stack([share * kl_n, student.log_norm_n - labels.sum(0)])  # settings.names: forward_kl, cross_entropy


def _exponentials(logits_nv: Tensor) -> tuple[Tensor, Tensor]:
    """[n] peak and Σ exp(x − peak); the logits become exp(x − peak)."""
    peak_n = logits_nv.amax(-1)
    return peak_n, logits_nv.sub_(peak_n[:, None]).exp_().sum(-1)
