"""What chats and the teacher's own text have to agree on with the model and with the samples that hold them."""

from __future__ import annotations

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.schema import Recipe


def text_problems(recipe: Recipe, source: Architecture) -> list[str]:
    """Of sections chat and labels: texts longer than the model's positions, or than a sample of the distillation; and what distills on chats."""
    problems = _chat_problems(recipe) if recipe.distill.text == "chat" else []
    limit = min(source.max_positions, source.attention_window or source.max_positions)
    if recipe.labels:
        length = recipe.labels.prompt_tokens + recipe.labels.new_tokens
        if length > limit:
            problems.append(f"labels.prompt_tokens + labels.new_tokens = {length} is beyond the model's {limit} positions; at most {limit}")
        if length > recipe.distill.sequence_length + 1:
            problems.append(
                f"labels.prompt_tokens + labels.new_tokens = {length} does not fit into a sample of distill.sequence_length + 1 = "
                f"{recipe.distill.sequence_length + 1} tokens; raise the one or shorten the others"
            )
    if recipe.chat and recipe.chat.sequence_length > limit:
        problems.append(f"chat.sequence_length={recipe.chat.sequence_length} is beyond the model's {limit} positions; at most {limit}")
    return problems


def _chat_problems(recipe: Recipe) -> list[str]:
    problems = []
    if not recipe.chat:
        problems.append("distill.text=chat: no section names the conversations; add the section chat, with chat.train")
    if recipe.labels:
        problems.append("labels: what the teacher writes would not be read with distill.text=chat; leave one of them out")
    if recipe.distill.mask_boundaries:
        problems.append("distill.mask_boundaries: with distill.text=chat the answers alone count already; leave it out")
    if recipe.correct_beside:
        problems.append("correct.beside: corrects on the corpus alone; with distill.text=chat correct the teacher first, without beside")
    return problems
