"""Section `labels`: text that the teacher writes and the student learns (sequence-level distillation, Kim & Rush, arXiv 1606.07947)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from minitron_megatron.config.section import UNSHAPING, Section


class Labels(Section):
    """The teacher continues the beginnings of training samples; distillation then trains on these continuations in place of data.train."""

    samples: int = Field(1024, ge=1, description="texts to write; each begins with another sample of the training text")
    prompt_tokens: int = Field(64, ge=1, description="tokens of the training text that each begins with; they do not count in the loss")
    new_tokens: int = Field(64, ge=1, description="tokens that the teacher adds, fewer where it ends the text; one short forward pass each")
    temperature: float = Field(0.0, ge=0, description="0: the most likely token each time; else sampled from softmax(logits / temperature)")
    top_p: float = Field(1.0, gt=0, le=1, description="sampled among the most likely tokens that together have this probability")
    seed: int = Field(1234, ge=0, description="order of the training samples, and the draws of each")
    micro_batch: int = Field(8, ge=1, description="texts in one forward pass of one process")
    save_every_samples: Annotated[int, UNSHAPING] = Field(256, ge=1, description="texts after which an interrupted stage continues")
