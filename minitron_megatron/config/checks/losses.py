"""What the losses of a distillation have to agree on."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.distill import Distill
from minitron_megatron.config.losses import LossWeight, WeightSchedule


def loss_problems(distill: Distill) -> list[str]:
    """Of distill.loss and distill.top_k, apart from any model."""
    problems = []
    shown = {name: weight.model_dump() if isinstance(weight, WeightSchedule) else weight for name, weight in distill.loss.items()}
    if not any(_highest(weight) > 0 for weight in distill.loss.values()) or any(_highest(weight) < 0 for weight in distill.loss.values()):
        problems.append(f"distill.loss={shown} needs weights ≥ 0 and one above 0")
    first = next(iter(distill.loss), None)
    if first and distill.loss[first] == "dynamic":
        problems.append(f"distill.loss.{first}=dynamic follows the first loss and is the first itself; put one with a number ahead of it")
    elif first and any(weight == "dynamic" for weight in distill.loss.values()) and not _highest(distill.loss[first]) > 0:
        problems.append(f"distill.loss: dynamic weights follow the first loss, {first}, whose weight is 0; put one that is trained on ahead of it")
    if distill.top_k:
        problems += _top_k_problems(distill)
    return problems


def vocabulary_problems(distill: Distill, source: Architecture) -> list[str]:
    if distill.top_k and distill.top_k >= source.vocab:
        return [f"distill.top_k={distill.top_k} leaves no tail of the source model's {source.vocab} tokens; give less, or leave it out"]
    return []


def _top_k_problems(distill: Distill) -> list[str]:
    """Reverse KL and Jensen–Shannon charge the student for where it puts its own mass, logits' distances need every logit: the tail has neither."""
    others = [name for name in distill.loss if name not in ("forward_kl", "cross_entropy")]
    problems = []
    if not distill.loss.get("forward_kl"):
        problems.append("distill.top_k is of forward_kl, which distill.loss lacks; add forward_kl, or leave top_k out")
    if others:
        problems.append(
            f"distill.top_k knows the teacher outside its {distill.top_k} likeliest tokens as one class only, and {', '.join(others)} "
            "needs it token by token; leave out one of the two"
        )
    return problems


def _highest(weight: LossWeight) -> float:
    """The largest number that it takes of itself; what follows another loss takes none."""
    if isinstance(weight, WeightSchedule):
        return max(weight.start, weight.end)
    return 0.0 if isinstance(weight, str) else weight
