"""training.deterministic: what it asks of libraries on CUDA, and nothing on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from minitron_megatron.platform import Platform, activate
from minitron_megatron.platform.deterministic import be_deterministic, environment

CUDA = Platform("cuda", "nccl", torch.device("cuda"))


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in environment():
        monkeypatch.setenv(name, "1")
    yield
    torch.use_deterministic_algorithms(False)


def test_on_cuda_megatrons_condition_holds_whatever_the_user_has_set() -> None:
    """megatron-core 0.16.1 raises in its deterministic mode unless this variable is 0."""
    be_deterministic(CUDA)
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"


@pytest.mark.parametrize("transformer_engine", [True, False])
def test_torchs_own_attention_has_to_be_deterministic_and_may_not_merely_warn(transformer_engine: bool) -> None:
    be_deterministic(replace(CUDA, transformer_engine=transformer_engine))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() is transformer_engine


def test_on_a_cpu_nothing_is_set() -> None:
    be_deterministic(activate("cpu"))
    assert {os.environ[name] for name in environment()} == {"1"}
    assert not torch.are_deterministic_algorithms_enabled()
