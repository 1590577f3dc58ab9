"""The independent reference of the losses on logits: whole fp64 logits, torch's own functions, autograd.

Legend: N tokens, V real vocabulary, K the teacher's likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_losses(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, top_k: int | None = None) -> dict[str, Tensor]:
    """[N] of every loss between two models' raw logits, those that know a temperature times its square."""
    student, teacher = student_NV / temperature, teacher_NV / temperature
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    middle = ((log_p.exp() + log_q.exp()) / 2).log()
    found = {
        "forward_kl": kl(log_q, log_p),
        "reverse_kl": kl(log_p, log_q),
        "jensen_shannon": (kl(log_q, middle) + kl(log_p, middle)) / 2,
        "mse": F.mse_loss(student, teacher, reduction="none").mean(-1),
    }
    if top_k:
        found["forward_kl_top_k"] = top_k_kl(log_p.exp(), log_q.exp(), top_k)
    return {name: temperature**2 * loss for name, loss in found.items()} | {"cosine": 1 - F.cosine_similarity(student_NV, teacher_NV, dim=-1)}


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a ‖ b)"""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def top_k_kl(p_NV: Tensor, q_NV: Tensor, k: int) -> Tensor:
    """KL over K + 1 classes, the last of which is what is missing to 1."""
    ids = q_NV.argsort(dim=-1, descending=True, stable=True)[:, :k]
    classes = [torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1) for kept in (q_NV.gather(-1, ids), p_NV.gather(-1, ids))]
    return kl(classes[0].log(), classes[1].log())


def cross_entropy(student_NV: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(student_NV, labels_N, reduction="none")
