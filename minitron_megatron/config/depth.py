"""Section `depth`: which layers are dropped, by what leaving them out does to the model.

Sources: P1 = arXiv 2407.14679, P2 = arXiv 2408.11796, Nemotron Elastic = arXiv 2511.16664.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from minitron_megatron.config.section import UNSHAPING, Section

Removal = Literal["block", "ranked", "greedy"]


class Depth(Section):
    """Layers or blocks are left out in memory, one candidate after another; without this section, Block Influence of single layers decides."""

    criterion: Literal["perplexity", "logit_error", "task", "influence"] = Field(
        "perplexity",
        description="rise of the LM loss (P1 section 2.2), normalised squared error of the logits (Nemotron Elastic), fall of a task's accuracy "
        "(P2 section 3), or Block Influence from the scores file, without a pass (P2 section 2.2)",
    )
    removal: Removal | None = Field(
        None,
        description="block: one contiguous block (P2 section 3); ranked: those that are least missed when left out alone (P1 section 2.2); greedy: "
        "one after another, the rest measured anew each time; default: greedy for logit_error, block for the others",
    )
    drop: int | None = Field(None, ge=1, description="layers to drop; default: what prune.target.layers leaves out")
    first_protected: int = Field(0, ge=0, description="layers at the beginning that are not tried")
    last_protected: int = Field(0, ge=0, description="layers at the end that are not tried")
    samples: int = Field(64, ge=1, description="packed samples of the training text")
    sequence_length: int = Field(4096, ge=2, description="tokens of each sample")
    micro_batch: int = Field(1, ge=1, description="samples in one forward pass")
    seed: int = Field(1234, ge=0, description="order in which documents are packed into samples")
    tasks: list[str] = Field([], description="lm-eval task files (.yaml) with local data, for criterion=task; accuracies are averaged")
    task_items: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    task_metric: Literal["acc", "acc_norm"] = "acc"
    reference_device_gib: Annotated[float, UNSHAPING] = Field(
        8.0, ge=0, description="logit_error: hidden states of the full model that stay on the device; more of them wait in host memory"
    )

    @property
    def how(self) -> Removal:
        return self.removal or ("greedy" if self.criterion == "logit_error" else "block")

    @property
    def reads_importance(self) -> bool:
        """Whether everything is in the scores file of this run's importance stage."""
        return self.criterion == "influence"

    @field_validator("task_items", mode="before")
    @classmethod
    def _count_or_all(cls, value: Any) -> Any:
        if value != "all" and not (isinstance(value, int) and value >= 1):
            raise ValueError("input should be a whole number of 1 or more, or all")
        return value
