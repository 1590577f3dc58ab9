"""Section `finetune`: what is left is trained on conversations."""

from __future__ import annotations

from pydantic import Field

from minitron_megatron.config.distill import LearningRate, TrainingRun


class FinetuneRate(LearningRate):
    """Lower than that of a distillation: the model is to learn a form, not a language."""

    peak: float = Field(2e-5, gt=0)
    minimum: float = Field(2e-6, ge=0)


class Finetune(TrainingRun):
    """Supervised fine-tuning of the distilled model on the chat data: cross-entropy of the answers' tokens."""

    sequence_length: int = Field(4096, ge=2)
    global_batch: int = Field(128, ge=1, description="samples a step, over all processes")
    learning_rate: FinetuneRate = FinetuneRate()
