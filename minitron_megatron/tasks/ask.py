"""Tasks asked of a model that several processes hold: one of them runs lm-eval, the others answer with it."""

from __future__ import annotations

from typing import Literal

from minitron_megatron.data.tokenizer import Tokenizer
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.scoring import Request, loglikelihoods
from minitron_megatron.parallel.world import World
from minitron_megatron.tasks.accuracy import task_accuracies


def accuracies_of_model(
    model: StageModel, task_files: list[str], *, items: int | Literal["all"], tokenizer: Tokenizer, world: World
) -> dict[str, dict[str, dict[str, float | None]]]:
    """task_accuracies of the model, on the main process; nothing on the others, which all call this. The model takes variable lengths."""
    if not task_files:
        return {}
    if not world.is_main:
        while (requests := world.from_main(None)) is not None:
            loglikelihoods(model, requests)
        return {}

    def ask(requests: list[Request]) -> list[tuple[float, bool]]:
        return loglikelihoods(model, world.from_main(requests))

    try:
        return task_accuracies(
            task_files,
            items=None if items == "all" else items,
            tokenize=tokenizer.encode,
            eod=tokenizer.eod,
            loglikelihoods=ask,
        )
    finally:
        world.from_main(None)  # lets the others go on, also when a task file turns out to be unusable
