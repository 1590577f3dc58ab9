"""Section `teacher_logits`: what a teacher thinks of each token, stored once and read by distillations in the teacher's place."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from minitron_megatron.config.section import UNSHAPING, Section


class TeacherLogits(Section):
    """The K likeliest tokens of each place with the mass of all others, or an unbiased sample of the teacher's distribution (arXiv 2503.16870)."""

    kind: Literal["top_k", "sample"] = Field("top_k", description="sample: tokens drawn from the teacher's distribution, with how often each came")
    k: int = Field(64, ge=1, description="top_k: likeliest tokens kept of each place; all others are one class")
    log_probs: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="top_k: type of the log-probabilities, off by at most 2^-11, 2^-8 or 2^-24 of their size"
    )
    draws: int = Field(50, ge=1, le=65535, description="sample: draws of each place")
    seed: int = Field(1234, ge=0, description="sample: of the draws; a sample's own are the same under every layout")
    temperature: float = Field(1.0, gt=0, description="of the stored distribution: the distillation's")
    block_samples: int = Field(64, ge=1, description="consecutive samples in one file: what is finished of an interrupted stage")
    samples: Annotated[int | None, UNSHAPING] = Field(None, ge=1, description="training samples; without it distill.steps × distill.global_batch")
    micro_batch: Annotated[int, UNSHAPING] = Field(1, ge=1, description="samples in one forward pass of one process")
    chunk_tokens: Annotated[int, UNSHAPING] = Field(128, ge=1, description="tokens whose logits exist at one time")

    def shaping(self) -> dict[str, Any]:
        """Without what belongs to the other kind."""
        unread = ("draws", "seed") if self.kind == "top_k" else ("k", "log_probs")
        return {name: value for name, value in super().shaping().items() if name not in unread}


class DistilledText(Section):
    """The part of `distill` that says what a training sample is."""

    text: str
    sequence_length: int
    seed: int
