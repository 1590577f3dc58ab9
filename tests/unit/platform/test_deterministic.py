"""training.deterministic: what it asks of libraries on CUDA, and nothing on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from minitron_megatron.platform import Platform, activate
from minitron_megatron.platform.deterministic import be_deterministic, environment


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in environment():
        monkeypatch.setenv(name, "1")
    yield
    torch.use_deterministic_algorithms(False)


def test_on_cuda_megatrons_condition_holds_whatever_the_user_has_set() -> None:
    """megatron-core 0.16.1 raises in its deterministic mode unless this variable is 0."""
    be_deterministic(Platform("cuda", "nccl", torch.device("cuda")))
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()


def test_on_a_cpu_nothing_is_set() -> None:
    be_deterministic(activate("cpu"))
    assert {os.environ[name] for name in environment()} == {"1"}
    assert not torch.are_deterministic_algorithms_enabled()
