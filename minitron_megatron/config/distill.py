"""Sections `distill` and `training`: losses, schedule, and how a training run is carried out.

Sources: P1 = arXiv 2407.14679, P2 = arXiv 2408.11796.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from minitron_megatron.config.losses import LossName, LossWeight
from minitron_megatron.config.section import UNSHAPING, Section


class LearningRate(Section):
    """Linear warm-up, then cosine from peak to minimum (P2 Table 4)."""

    peak: float = Field(1e-4, gt=0)
    minimum: float = Field(1e-5, ge=0)
    warmup_steps: int = Field(40, ge=0)


class Adam(Section):
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)


class Wandb(Section):
    project: str
    mode: Literal["online", "offline"] = "online"


class TrainingRun(Section):
    """What every stage that trains is told: how much of which text at a time, and the optimizer."""

    steps: int = Field(ge=1)
    sequence_length: int = Field(8192, ge=2)
    global_batch: int = Field(1152, ge=1, description="samples a step, over all processes")
    micro_batch: int = Field(1, ge=1, description="samples in one forward and backward pass of one process")
    learning_rate: LearningRate = LearningRate()
    adam: Adam = Adam()
    clip_gradient_norm: float = Field(1.0, gt=0)
    save_every_steps: Annotated[int, UNSHAPING] = Field(100, ge=1)
    keep_checkpoints: Annotated[int, UNSHAPING] = Field(2, ge=1, description="newest checkpoints kept while training")
    validate_every_steps: int = Field(100, ge=1)
    validation_samples: int = Field(32, ge=1)
    loss_memory_mib: int = Field(
        512, ge=1, description="for the logits of a chunk of tokens, of teacher and student, and of a second chunk under tensor parallelism"
    )
    loss_chunk_tokens: int | None = Field(
        None, ge=1, description="tokens whose logits exist at one time, in place of what loss_memory_mib has room for"
    )
    seed: int = Field(1234, ge=0, description="order of the training samples")
    wandb: Annotated[Wandb | None, UNSHAPING] = None


MAY_CHANGE_IN_A_RUN = (
    "steps",
    "global_batch",
    "micro_batch",
    "loss_memory_mib",
    "loss_chunk_tokens",
    "validate_every_steps",
    "validation_samples",
)
"""What people change when a job is moved to other machines or made longer; samples are counted one by one."""


class HiddenLoss(Section):
    """Hidden states compared as well as logits (P1 section 3); it pays where depth was cut a lot.

    The state of a layer is what its first norm gives to the attention; a learned linear projection takes the student's to the teacher's channels.
    """

    pairs: list[tuple[int, int]] | Literal["last_minus_2", "proportional", "kept"] = Field(
        "last_minus_2",
        description="[teacher layer, student layer], counted from 0; last_minus_2: the one pair of P1; "
        "proportional: every student layer but the first; kept: the first kept layer after each dropped block",
    )
    embeddings: bool = Field(False, description="compares the embeddings too")
    kind: Literal["cosine", "mse"] = Field("cosine", description="P1 found cosine the better one")
    projection: Literal["shared", "per_pair"] = Field("shared", description="one for all pairs and the embeddings (P1), or one for each")
    weight: Literal["dynamic"] | Annotated[float, Field(gt=0)] = Field(
        "dynamic", description="α in L_logits + α·L_hidden; dynamic: L_logits / L_hidden of the step before (P1)"
    )

    @field_validator("pairs", mode="before")
    @classmethod
    def _pairs_or_rule(cls, value: Any) -> Any:
        if value in ("last_minus_2", "proportional", "kept") or (isinstance(value, list) and all(_is_pair(pair) for pair in value)):
            return value
        raise ValueError("input should be last_minus_2, proportional, kept or a list of [teacher layer, student layer], such as [[29, 13]]")

    @field_validator("weight", mode="before")
    @classmethod
    def _dynamic_or_number(cls, value: Any) -> Any:
        if value != "dynamic" and not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise ValueError("input should be a number above 0, or dynamic")
        return value


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(layer, int) and not isinstance(layer, bool) for layer in value)


class Distill(TrainingRun):
    """The original teaches what is left (P1 section 3): forward KL on the logits alone, temperature 1, by default."""

    loss: dict[LossName, LossWeight] = Field(
        {"forward_kl": 1.0},
        description="weight of each loss: a number, {from: a, to: b, kind: cosine or linear, steps: n}, "
        "or dynamic: such that it weighs as much as the first one did at the step before; a name alone weighs 1",
    )
    temperature: float = Field(1.0, gt=0, description="of KL, reverse KL and Jensen–Shannon, which count its square")
    top_k: int | None = Field(None, ge=1, description="forward KL over the teacher's K likeliest tokens and one class for all others")
    teacher_outputs: Annotated[Literal["live", "stored"], UNSHAPING] = Field(
        "live", description="stored: read from the stage teacher-logits, no teacher is loaded (section teacher_logits)"
    )  # unshaping: the artifacts that are read tell the two apart
    hidden: HiddenLoss | None = Field(None, description="compares hidden states as well; without it the logits alone")
    pause_after_steps: Annotated[int | None, UNSHAPING] = Field(
        None, ge=0, description="ends this start here, validated and saved but not published; a start without it goes on"
    )
    handover_device_gib: Annotated[float, UNSHAPING] = Field(
        4.0, ge=0, description="teacher's states of a step kept on the device, the rest on the host"
    )
    text: Literal["data", "chat"] = Field(
        "data", description="data: the corpus, or what the section labels makes of it; chat: conversations, whose answers alone count (section chat)"
    )
    mask_boundaries: bool = Field(False, description="the first token of a document, a guess from the end of an unrelated one, does not count")

    @field_validator("loss", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {value: 1.0} if isinstance(value, str) else value


class Training(Section):
    """How a training run is carried out: memory against time. None of it shapes the result beyond rounding."""

    distributed_optimizer: bool = Field(True, description="each data-parallel process keeps its part of the optimizer's state")
    overlap_grad_reduce: bool = Field(False, description="gradients are summed over data-parallel processes while backward still runs")
    overlap_param_gather: bool = Field(False, description="updated weights are gathered while the next forward already runs")
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations computed again in backward instead of kept: of each FFN (selective) or of each layer (full)"
    )
    asynchronous_checkpoints: bool = Field(True, description="another process writes a checkpoint while training goes on")
    overlap_tensor_parallel: bool = Field(
        False, description="the student's layers exchange sequence shards while they multiply; needs Transformer Engine and parallel.sequence"
    )
    deterministic: bool = Field(False, description="on CUDA kernels that give the same bits each time, slower: resuming is then exact there too")
