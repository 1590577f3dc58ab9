"""Where and how a measurement computes, what it is given, and what it leaves: values that travel between processes as JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """spec: Transformer Engine's layers or megatron's own; a CPU has the latter alone. fp8: a scaling of the recipe's section fp8, or none."""

    device: Literal["cpu", "cuda"]
    spec: Literal["te", "local"] = "te"
    precision: Literal["fp32", "bf16"] = "bf16"
    fp8: str = ""
    deterministic: bool = False

    def environment(self) -> dict[str, str]:
        """What is set before torch is imported."""
        # cuBLAS multiplies fp32 in TF32 where Transformer Engine asks it to: 10 bits of mantissa, which no fp32 tolerance allows for
        return {"NVIDIA_TF32_OVERRIDE": "0"} if self.precision == "fp32" else {}


@dataclass(frozen=True)
class Run:
    """One measurement; `given` are its function's keywords, as JSON so that runs are equal where all of them are."""

    kind: str
    setting: Setting
    given: str = "{}"

    @property
    def name(self) -> str:
        """Of its folder."""
        text = json.dumps(asdict(self), sort_keys=True)
        setting = self.setting
        parts = [self.kind, setting.device, setting.spec, setting.precision, setting.fp8, hashlib.sha256(text.encode()).hexdigest()[:8]]
        return "-".join(part for part in parts if part)

    @staticmethod
    def of(kind: str, setting: Setting, **given: Any) -> Run:
        return Run(kind, setting, json.dumps(given, sort_keys=True))

    @staticmethod
    def from_json(text: str) -> Run:
        values = json.loads(text)
        return Run(values["kind"], Setting(**values["setting"]), values["given"])

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """What a run left: figures, and tensors on disk."""

    figures: dict[str, Any]
    folder: Path

    def tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / "tensors.safetensors")
