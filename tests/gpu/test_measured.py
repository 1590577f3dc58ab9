"""The claims about a GPU, measured on one; tests/gpu/run_all.sh measures the same and prints a table."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from .bench import Bench, in_processes
from .claims import GROUPS
from .ground import Ground
from .houses import ROOT
from .verdict import judge, table

FP8_SINCE = (8, 9)


def without() -> str:
    """What this machine lacks; empty where all of it is here."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    capability = torch.cuda.get_device_capability()
    return "" if capability >= FP8_SINCE else f"a GPU of compute capability {capability} has no FP8"


def reason(group: str) -> str:
    """Why a group cannot be measured here."""
    if not without() and group == "smollm2" and not (ROOT / ".demo" / "model").is_dir():
        return "SmolLM2 is not here: python launch/demo_inputs.py --out .demo --parts model sotu"
    return without()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return in_processes(tmp_path_factory.mktemp("gpu"))


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_claimed_of_a_gpu_holds(group: str, request: pytest.FixtureRequest) -> None:
    if why := reason(group):
        pytest.skip(f"{group}: {why}")
    bench: Bench = request.getfixturevalue("bench")
    verdicts = judge(GROUPS[group](Ground(bench.folder)), bench)
    print(table(verdicts))
    assert all(verdict.holds for verdict in verdicts), table(verdicts)
