"""Section `export`: the form in which the student leaves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from minitron_megatron.config.section import Section


class Export(Section):
    """The student as files for other programs."""

    format: Literal["huggingface", "nemo"] = Field("huggingface", description="a folder for transformers, or a .nemo archive with torch_dist weights")
