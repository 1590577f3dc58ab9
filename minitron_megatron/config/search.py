"""Section `search`: which architectures are thinkable, which fit the budgets, and how the best of them is found.

Source: P1 = arXiv 2407.14679, section 2.4 (search and short retraining) and 4.3 (spaces).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from minitron_megatron.config.distill import LearningRate
from minitron_megatron.config.section import UNSHAPING, Section

DataType = Literal["fp32", "bf16", "fp8", "int8", "int4"]
BYTES_OF: dict[str, float] = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1, "int4": 0.5}
GpuName = Literal["H100_SXM", "H100_PCIe", "H200", "A100_SXM_80GB", "L40S", "L4"]


def _sizes(value: Any) -> Any:
    """A range becomes the list of its sizes, so that the resolved recipe says what is searched."""
    if isinstance(value, dict) and value.keys() == {"min", "max", "step"} and all(_is_size(item) for item in value.values()):
        return list(range(value["min"], value["max"] + 1, value["step"])) or _refuse_sizes()
    if isinstance(value, list) and value and all(_is_size(item) for item in value):
        return sorted(set(value))
    return _refuse_sizes()


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _refuse_sizes() -> Any:
    raise ValueError("input should be a list of whole numbers of 1 or more, or {min: , max: , step: } with max at least min")


Axis = Annotated[list[int], BeforeValidator(_sizes)]


class Space(Section):
    """Sizes that are tried, in every combination; an axis that is not named stays as the source has it.

    A space of P1 (section 4.3), 15B → 8B: layers 29–32, heads {32, 48}, ffn_factor {2.5, 3, 3.5, 4},
    hidden {4096, 4608, 5120, 5632, 6144}.
    """

    layers: Axis | None = None
    hidden: Axis | None = Field(None, description="embedding channels")
    heads: Axis | None = Field(None, description="query heads")
    kv_groups: Axis | None = Field(None, description="key/value groups")
    ffn: Axis | None = Field(None, description="FFN neurons of every layer, or of one expert")
    ffn_factor: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, min_length=1, description="FFN neurons as multiples of hidden, in place of ffn; rounded to `alignment`"
    )
    experts: Axis | None = None
    alignment: int = Field(1, ge=1, description="hidden and ffn are multiples of it; 64 or 128 suit the matrix units of a GPU")

    def axes(self) -> dict[str, list[int]]:
        """Those that are named, but for ffn_factor."""
        named = {name: getattr(self, name) for name in ("layers", "hidden", "heads", "kv_groups", "ffn", "experts")}
        return {name: sizes for name, sizes in named.items() if sizes is not None}


class MemoryBudget(Section):
    """Weights and KV cache of a server; activations are not in it."""

    gib: float | None = Field(None, gt=0, description="the most that is allowed; without it memory is only reported")
    batch: int = Field(1, ge=1, description="sequences at a time")
    context: int = Field(4096, ge=1, description="tokens of each sequence, prompt and answer")
    weights: DataType = "bf16"
    kv_cache: DataType = "bf16"


class LatencyBudget(Section):
    """Time of one request: the prompt, then token after token."""

    kind: Literal["roofline", "measured"] = Field(
        "roofline", description="roofline: a GPU's data-sheet numbers; measured: layers of a few shapes on this machine, and a linear fit"
    )
    gpu: GpuName | None = Field(None, description="of the roofline")
    precision: Literal["bf16", "fp8"] = Field("bf16", description="of weights and matrix products under the roofline")
    batch: int = Field(1, ge=1, description="sequences at a time")
    prompt: int = Field(512, ge=1, description="tokens")
    generate: int = Field(128, ge=0, description="tokens")
    limit_ms: float | None = Field(None, gt=0, description="the most that is allowed; without it latency is only reported")
    shapes: int = Field(8, ge=4, description="shapes that are measured")


class ShortDistillation(Section):
    """What each candidate is trained with where it differs from section `distill` (P1: about 1.8 B tokens, ranks settle at about 300 steps)."""

    rounds: list[Annotated[int, Field(ge=0)]] = Field([100, 200, 400], min_length=1, description="steps after which the worse are left out")
    keep: float = Field(0.5, gt=0, le=1, description="share of the candidates that goes on after each round but the last, rounded up")
    global_batch: int | None = Field(None, ge=1)
    micro_batch: int | None = Field(None, ge=1)
    sequence_length: int | None = Field(None, ge=2)
    learning_rate: LearningRate | None = Field(None, description="its cosine ends with the last round, so that a round continues the one before")
    validation_samples: int | None = Field(None, ge=2, description="held-out windows that candidates are compared on")
    save_every_steps: Annotated[int | None, UNSHAPING] = Field(None, ge=1, description="default: at the end of each round")

    @field_validator("rounds")
    @classmethod
    def _ascending(cls, rounds: list[int]) -> list[int]:
        if rounds != sorted(set(rounds)) or rounds[-1] < 1:
            raise ValueError("input should be numbers of steps in ascending order, the last one above 0, such as [50, 100]; 0 is right after pruning")
        return rounds


class Search(Section):
    """Enumerate, filter by budgets, choose a diverse shortlist, prune and shortly distil each, keep the best (P1 section 2.4)."""

    space: Space
    parameters: float | None = Field(None, gt=0, description="target, tied weights once")
    nonembedding_parameters: float | None = Field(None, gt=0, description="target, without embedding and output layer")
    tolerance: float = Field(0.05, ge=0, lt=1, description="share by which parameters may miss their target (P1: 5 %)")
    memory: MemoryBudget | None = None
    latency: LatencyBudget | None = None
    shortlist: int = Field(4, ge=1, description="candidates that are pruned and trained")
    pool: float = Field(0.5, gt=0, le=1, description="share of the survivors, those that keep most importance, that the shortlist is drawn from")
    short_distillation: ShortDistillation = ShortDistillation()
    rank_by: Literal["cross_entropy", "forward_kl"] = Field("cross_entropy", description="on held-out windows: LM loss (P1), or KL to the teacher")
    jobs: Annotated[int, UNSHAPING] = Field(1, ge=1, description="candidates trained at the same time, each on the processes of `parallel`")
