"""Section `importance`: one forward pass over calibration samples.

Sources: P1 = arXiv 2407.14679, P2 = arXiv 2408.11796.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from minitron_megatron.config.section import UNSHAPING, Section

Aggregation = Literal["mean", "l2", "variance"]
KeptSums = Literal["all", "default"]


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
    block_sizes: list[Annotated[int, Field(ge=2)]] = Field(
        [], description="Block Influence of contiguous blocks of so many layers as well; costs the memory of as many hidden states"
    )
    sums: KeptSums = Field(
        "all",
        description="`all`, of which prune ranks by any criterion and aggregation; `default`, of its default criteria with sequence=mean alone: "
        "a faster pass",
    )
    seed: int = Field(1234, ge=0, description="order in which documents are packed into samples")
    save_every_samples: Annotated[int, UNSHAPING] = Field(
        64, ge=1, description="samples after which an interrupted pass continues; rounded up to 16 for every data-parallel process"
    )
