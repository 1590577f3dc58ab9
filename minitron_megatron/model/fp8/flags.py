"""How a model computes in FP8, in megatron-core's words."""

from __future__ import annotations

from typing import Any

from minitron_megatron.config.fp8 import ModelFp8


def fp8_settings(fp8: ModelFp8 | None) -> dict[str, Any]:
    """TransformerConfig arguments; none where nothing is FP8 or where it is emulated, of which megatron knows nothing."""
    if fp8 is None or fp8.emulated:
        return {}
    if fp8.scaling == "nvfp4":
        return {"fp4": "e2m1", "fp4_recipe": "nvfp4", "fp4_param": fp8.weights, **_ends(fp8)}
    delayed = {
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": fp8.amax_algorithm,
    }
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.scaling,
        "fp8_param": fp8.weights,
        **(delayed if fp8.scaling == "delayed" else {}),
        **_ends(fp8),
    }


def _ends(fp8: ModelFp8) -> dict[str, Any]:
    return {"first_last_layers_bf16": fp8.first_last_layers_bf16}
