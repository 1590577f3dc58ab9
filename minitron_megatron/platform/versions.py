"""What differs between megatron-core 0.16.1 and 0.19.2, hidden here; both were read and run.

Differs, and has a function below:
- async saving: 0.19 wants NVIDIA's resiliency extension unless async_strategy="mcore", an argument that 0.16 lacks;
- common state of a checkpoint: 0.16 writes common.pt, 0.19 puts it among the shards (0.19 reads both, 0.16 its own);
- ProcessGroupCollection: in 0.19 `hasattr` is true of every declared group (an unset one reads as None);
- TransformerLayerSubmodules.mlp: ModuleSpec in 0.16, functools.partial in 0.19.

Differs, and is met by writing code that both accept:
- norms: 0.19 calls `layer_norm(config=, hidden_size=, eps=)` itself, so a norm is a class, never a ModuleSpec. The
  final norm is `TransformerBlockSubmodules(layer_specs, layer_norm=OurNorm)`; a plain layer spec gets LayerNormImpl;
- GPTModel._postprocess: called with keywords; 0.19 adds padding_mask, output_processor(_context): take **kwargs;
- ColumnParallelLinear and RowParallelLinear: 0.19 adds `name`; MLP and SelfAttention too: pass **kwargs on;
- get_gpt_layer_local_spec: 0.19 lacks moe_use_legacy_grouped_gemm; the rest is equal;
- dist_checkpointing.save/load: 0.19 has no common_strategy and takes no strategy tuple ("torch_dist", 1): give neither;
- vocab_parallel_cross_entropy: only 0.19 takes tp_group; in 0.16 it is the global tensor-parallel group;
- TransformerConfig: 0.19 lacks async_tensor_model_parallel_allreduce, moe_extended_tp, moe_use_legacy_grouped_gemm;
- DistributedDataParallel: 0.19 may be given full_param_layout, else computes the same layout;
- finalize_model_grads: 0.19 divides by max(tokens, 1), 0.16 does not divide at 0 tokens: gradients are zero in both;
- moe_utils.get_updated_expert_bias: 0.19 needs `tp_dp_cp` in the collection where routers have an expert bias;
- schedules.backward_step, set_current_microbatch, MegatronLegacyTokenizer, AdamOptimizerConfig: changed; not used here.

Checked and equal for what this project calls: GPTModel's constructor and forward, TransformerBlock(Submodules),
get_num_layers_to_build, P2PCommunicator, get_forward_backward_func and the three schedules (keyword arguments),
parallel_state's getters, HyperCommGrid.create_pg/get_pg, get_megatron_optimizer and the fields of OptimizerConfig and
DistributedDataParallelConfig that both have, IndexedDataset and its builder, BlendedMegatronDatasetBuilder,
GPTDatasetConfig, pipeline_model_parallel_layout, AsyncCallsQueue(persistent=False).
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

from minitron_megatron.errors import PlatformError

LOWEST, BELOW = (0, 16, 1), (0, 20, 0)
MENDED_BY = 'pip install "megatron-core>=0.16.1,<0.20" (0.17 and later need Python 3.12)'


@cache
def installed() -> tuple[int, int, int]:
    """Version of the installed megatron-core, read without importing it. Raises PlatformError where it is absent."""
    try:
        return parse(importlib.metadata.version("megatron-core"))
    except importlib.metadata.PackageNotFoundError:
        raise PlatformError(f"megatron-core is not installed; {MENDED_BY}") from None


def parse(version: str) -> tuple[int, int, int]:
    """(major, minor, patch) of a version such as 0.16.1 or 0.20.0rc1. Raises PlatformError on anything else."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if found is None:
        raise PlatformError(f"megatron-core has the version {version!r}, which is no release; {MENDED_BY}")
    return int(found[1]), int(found[2]), int(found[3] or 0)


def is_supported(version: tuple[int, int, int]) -> bool:
    """Whether a release lies in the range that this project was read and run against."""
    return LOWEST <= version < BELOW


def require_supported() -> None:
    """Raises PlatformError where megatron-core is absent or outside the supported range."""
    if not is_supported(installed()):
        shown = _dotted(installed())
        raise PlatformError(f"megatron-core {shown} is installed, supported is >=0.16.1,<0.20; {MENDED_BY}")


def require_readable(directory: Path | str) -> None:
    """Raises PlatformError for a checkpoint whose common state this megatron-core cannot find."""
    path = Path(directory)
    complete, has_common = (path / "metadata.json").exists(), (path / "common.pt").exists()
    if installed() < (0, 17, 0) and complete and not has_common:
        raise PlatformError(
            f"{path}: has no common.pt, so a newer megatron-core wrote it; {_dotted(installed())} is installed "
            "here and cannot read it: use the newer release, or export to Hugging Face format there and import here"
        )


def submodules_of(entry: Any) -> Any:
    """The submodules of an entry of a layer spec: of a ModuleSpec (0.16.1), or of a call with its arguments (0.19.2); None where it has none."""
    return entry.keywords.get("submodules") if isinstance(entry, partial) else getattr(entry, "submodules", None)


def asynchronous_save() -> dict[str, str]:
    """Arguments with which dist_checkpointing.save(async_sharded_save=True) needs nothing but megatron-core itself."""
    return {"async_strategy": "mcore"} if _takes_async_strategy() else {}


@cache
def _takes_async_strategy() -> bool:
    from megatron.core import dist_checkpointing

    return "async_strategy" in inspect.signature(dist_checkpointing.save).parameters


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))
