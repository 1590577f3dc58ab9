"""What the stage says: depth.json, and one line."""

from __future__ import annotations

from typing import Any

from minitron_megatron.config.depth import Depth
from minitron_megatron.depth.choice import Choice, Round, is_noise, order_of_removal, unclear_rounds
from minitron_megatron.depth.measured import Measured

UNITS = {"perplexity": "LM loss, nats/token", "logit_error": "normalised MSE of the logits", "task": "accuracy", "influence": "Block Influence"}


def depth_result(settings: Depth, baseline: Measured | None, rounds: list[Round]) -> dict[str, Any]:
    """depth.json."""
    order = order_of_removal(rounds)
    return {
        "criterion": settings.criterion,
        "removal": settings.how,
        "unit": UNITS[settings.criterion],
        "baseline": None if baseline is None else {"value": baseline.value, "stderr": baseline.stderr},
        "rounds": [item.to_dict() for item in rounds],
        "order": order,
        "dropped_layers": sorted(order),
        "is_noise": is_noise(rounds),
    }


def summary(settings: Depth, choice: Choice, rounds: list[Round]) -> str:
    """Which layers go, and whether the choice is clear."""
    order = order_of_removal(rounds)
    gone = f"{order[0]}–{order[-1]}" if choice.removal == "block" and len(order) > 1 else ", ".join(map(str, sorted(order)))
    text = f"{settings.criterion}, {choice.removal}: {choice.measurements} candidates, drops {'layers' if len(order) > 1 else 'layer'} {gone}"
    unclear = unclear_rounds(rounds)
    if not unclear:
        return text
    margin, error = unclear[0].margin or (0.0, None)
    which = "" if len(rounds) == 1 else f" of round {', '.join(str(rounds.index(item) + 1) for item in unclear)}"
    mend = "ask more items" if settings.criterion == "task" else "measure more samples"
    return f"{text}; the choice{which} is within noise (margin {margin:.3g} ± {error:.2g}): {mend}"
