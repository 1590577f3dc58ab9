"""What a model with experts is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.errors import PlatformError
from minitron_megatron.model.experts import expert_settings
from minitron_megatron.platform import Platform

MIXTRAL = Architecture("mixtral", 3, 24, 8, 2, 6, 16, 131, False, 64, 1e-5, 10000.0, None, None, 4, 2)
DENSE = Architecture("mistral", 3, 24, 8, 2, 6, 16, 131, False, 64, 1e-5, 10000.0)


def test_experts_on_cuda_without_transformer_engine_are_refused_and_dense_models_are_not(layout: Any) -> None:
    cuda = Platform("cuda", "nccl", torch.device("cuda"))
    with pytest.raises(PlatformError, match=r"need Transformer Engine, .*install it .*or set platform=cpu"):
        expert_settings(MIXTRAL, layout, cuda)
    assert expert_settings(DENSE, layout, cuda) == {}
