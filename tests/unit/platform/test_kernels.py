"""Element-wise work is left as it is on a CPU, and compiled once for each function on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.platform.kernels import block_bytes, elementwise


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def test_a_cpu_runs_the_function_itself_block_by_block() -> None:
    cpu = torch.device("cpu")
    assert elementwise(doubled, cpu) is doubled
    assert block_bytes(cpu) is not None


def test_on_cuda_the_function_is_compiled_once_and_takes_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function: given.append(function) or (lambda *args: function(*args)))
    cuda = torch.device("cuda")
    compiled = elementwise(doubled, cuda)
    assert elementwise(doubled, cuda) is compiled and given == [doubled]
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    assert block_bytes(cuda) is None
