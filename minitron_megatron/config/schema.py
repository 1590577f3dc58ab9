"""The recipe: one frozen, typed section per stage; units are in the names, defaults follow the papers.

Sources: P1 = arXiv 2407.14679, P2 = arXiv 2408.11796.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator

Aggregation = Literal["mean", "l2", "variance"]


UNSHAPING = "no part of a result's identity"
"""Marks a field (Annotated[int, UNSHAPING]) that says how the work is done and leaves what comes out as it is."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def shaping(self) -> dict[str, Any]:
        """The values that shape a stage's result: every field but those marked UNSHAPING."""
        unshaping = {name for name, field in type(self).model_fields.items() if UNSHAPING in field.metadata}
        return self.model_dump(mode="json", exclude=unshaping)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take `steps: yes` for 1."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("input should not be true or false")
        return value


class Model(Section):
    """The model to compress."""

    path: str = Field(description="folder with config.json, safetensors and tokenizer, or a Megatron torch_dist checkpoint")
    hf_config: str | None = Field(None, description="config.json that goes with a Megatron checkpoint")


class Data(Section):
    """Text for training, calibration and evaluation: globs of .txt, .jsonl(.gz, .zst) or .parquet."""

    train: list[str] = Field(min_length=1, description="globs; one .txt file, one .jsonl line or one .parquet row is a document")
    text_field: str = Field("text", description="field or column that holds the text in .jsonl and .parquet")
    heldout_documents: int = Field(12, ge=1, description="the last documents of `train`, kept for evaluation; training never sees them")
    out_of_domain: list[str] = Field([], description="globs of another corpus, evaluated only")
    tokenizer: str | None = Field(None, description="folder of a Hugging Face tokenizer or a SentencePiece .model; default: the model's own")
    workers: int = Field(2, ge=1, description="processes that tokenize")


Rule = str | Sequence[int]
"""How layers are dealt to pipeline stages: cost, even, or the layers of each stage."""


def _rule_or_list(value: Any) -> Any:
    listed = isinstance(value, list | tuple) and len(value) > 0 and all(type(item) is int and item >= 1 for item in value)
    if value not in ("cost", "even") and not listed:
        raise ValueError("input should be cost, even or a list of whole numbers of 1 or more")
    return value


LayersPerStage = Annotated[Literal["cost", "even"] | list[int], BeforeValidator(_rule_or_list)]


class TeacherParallel(Section):
    """The teacher's own layout in a distillation; its data-parallel size is what the processes leave."""

    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    sequence: bool = False
    layers_per_stage: LayersPerStage = Field("cost", description="cost, even, or a list")


TeacherLayout = Annotated[
    Annotated[TeacherParallel, Tag("[own]")] | Annotated[Literal["auto", "student"], Tag("[name]")],
    Discriminator(lambda value: "[name]" if isinstance(value, str) else "[own]"),
]


class Parallel(Section):
    """Sizes of the process groups; their product is the number of processes. The source, the pruned model and the student use it."""

    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    virtual: int = Field(1, ge=1, description="virtual pipeline stages of each process (interleaved 1F1B)")
    data: int = Field(1, ge=1)
    expert: int = Field(1, ge=1, description="data-parallel ranks that share the experts of a layer out among themselves; divides data")
    context: int = Field(1, ge=1, description="context parallel: Transformer Engine on a GPU only")
    sequence: bool = Field(False, description="sequence parallel: activations between tensor-parallel regions are sharded along the sequence")
    layers_per_stage: LayersPerStage = Field(
        "cost", description="cost: stages of equal work, embedding and output layer counted; even: equal numbers; a list: layers of each stage"
    )
    teacher: TeacherLayout = Field(
        "auto", description="layout of the teacher; auto: without a pipeline where its weights fit beside the student's; student: the same sizes"
    )

    timeout_seconds: int = Field(1800, ge=1, description="longest wait of a process for the others; then the run ends instead of hanging")

    @property
    def processes(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data


class ImportanceAggregation(Section):
    """First over the tokens of a sample, then over samples; default: P1 Table 11."""

    batch: Aggregation = "l2"
    sequence: Aggregation = "mean"


class Importance(Section):
    """One forward pass over calibration samples (P1 section 2.2)."""

    samples: int = Field(1024, ge=1, description="packed calibration samples")
    skip_samples: int = Field(0, ge=0, description="the first sample measured; `minitron importance merge` adds passes over other samples")
    sequence_length: int = Field(4096, ge=2, description="tokens of each sample")
    micro_batch: int = Field(1, ge=1, description="samples in one forward pass")
    seed: int = Field(1234, ge=0, description="order in which documents are packed into samples")
    save_every_samples: Annotated[int, UNSHAPING] = Field(
        64, ge=1, description="samples after which an interrupted pass continues; rounded up to 16 for every data-parallel process"
    )


class Target(Section):
    """Sizes of the pruned model; a size that is not named stays as it is."""

    layers: int | None = Field(None, ge=1)
    hidden: int | None = Field(None, ge=1, description="embedding channels")
    ffn: int | None = Field(None, ge=1, description="FFN neurons of every layer")
    heads: int | None = Field(None, ge=1, description="query heads, the same number in each key/value group")
    experts: int | None = Field(None, ge=1, description="experts of every layer; ffn is then the width of each")

    def sizes(self) -> dict[str, int]:
        return {name: size for name, size in self.model_dump().items() if size is not None}


class Prune(Section):
    """What is kept: the units with the highest scores (P1 section 2.3)."""

    target: Target
    scores: Literal["activation", "magnitude", "random"] = Field("activation", description="magnitude and random are baselines")
    scores_file: str | None = Field(None, description="scores of a merge or of another run, in place of this run's importance stage")
    aggregation: ImportanceAggregation = ImportanceAggregation()
    seed: int = Field(0, ge=0, description="of the random baseline")

    @property
    def reads_importance(self) -> bool:
        """Whether the scores are those of this run's importance stage."""
        return self.scores == "activation" and self.scores_file is None


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


class Distill(Section):
    """The original teaches what is left (P1 section 3): forward KL on the logits alone, temperature 1, by default."""

    loss: dict[Literal["forward_kl", "cross_entropy"], float] = Field({"forward_kl": 1.0}, description="weight of each loss; a name alone weighs 1")
    temperature: float = Field(1.0, gt=0)
    hidden: HiddenLoss | None = Field(None, description="compares hidden states as well; without it the logits alone")
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
    handover_device_gib: Annotated[float, UNSHAPING] = Field(
        4.0, ge=0, description="teacher's states of a step kept on the device, the rest on the host"
    )
    loss_chunk_tokens: int = Field(256, ge=1, description="tokens whose logits exist at one time")
    seed: int = Field(1234, ge=0, description="order of the training samples")
    wandb: Annotated[Wandb | None, UNSHAPING] = None

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


class Evaluate(Section):
    """Held-out perplexity, agreement with the teacher, tasks, a continuation."""

    tokens: Annotated[int, Field(ge=1)] | Literal["all"] = Field("all", description="tokens of each domain, in whole windows")
    sequence_length: int = Field(4096, ge=2)
    tasks: list[str] = Field([], description="lm-eval task files (.yaml) with local data")
    task_items: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    prompt: str = "The"
    generate_tokens: int = Field(32, ge=0)

    @field_validator("tokens", "task_items", mode="before")
    @classmethod
    def _count_or_all(cls, value: Any) -> Any:
        if value != "all" and not (isinstance(value, int) and value >= 1):
            raise ValueError("input should be a whole number of 1 or more, or all")
        return value


class Recipe(Section):
    """One compression from a source model to an exported student."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder below `runs`")
    runs: str = "runs"
    platform: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the machine multiplies in it, else fp32")
    model: Model
    data: Data
    parallel: Parallel = Parallel()
    importance: Importance = Importance()
    prune: Prune
    distill: Distill
    training: Training = Training()
    evaluate: Evaluate = Evaluate()
