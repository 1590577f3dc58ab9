"""Section `chat`: conversations for fine-tuning, on whose answers alone a model is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from minitron_megatron.config.section import UNSHAPING, Section


class Chat(Section):
    """Conversations in the form of the tokenizer's chat template; only what the assistant says counts in the loss."""

    train: list[str] = Field(
        min_length=1, description='globs of .jsonl(.gz, .zst); a line is {"messages": [{"role": "user", "content": "…"}, …]}; "weight": of an answer'
    )
    messages_field: str = Field("messages", description="field of a line that holds the messages")
    heldout_conversations: int = Field(12, ge=1, description="the last conversations of `train`, kept for validation; training never sees them")
    template: str = Field("auto", description="auto: the tokenizer's own chat template; else a file of Jinja text")
    template_arguments: dict[str, str | bool | int | float] = Field(
        {}, description="values for the template, such as date_string: 26 Jul 2024, without which some put the day of the run into every conversation"
    )
    sequence_length: int = Field(4096, ge=2, description="tokens of a sample, which holds whole conversations; a longer one is cut")
    packing: Literal["best_fit", "sequential"] = Field("best_fit", description="which conversations share a sample")
    workers: Annotated[int, UNSHAPING] = Field(2, ge=1, description="processes that tokenize")
