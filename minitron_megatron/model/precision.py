"""Names of number formats in recipes ↔ torch types."""

from __future__ import annotations

import torch


def torch_dtype(precision: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
