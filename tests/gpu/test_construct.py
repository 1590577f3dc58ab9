"""Models of Transformer Engine's modules are saved as the local spec's are; on a GPU, and without a driver where its CUDA build imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.platform.engine import import_problem

PROBLEM = import_problem()


@pytest.fixture(scope="module")
def families() -> dict[str, dict[str, Any]]:
    machine = "gpu" if torch.cuda.is_available() else "no-driver"
    command = [sys.executable, str(Path(__file__).with_name("construct.py")), machine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(PROBLEM is not None, reason=f"Transformer Engine: {PROBLEM}")
def test_a_teacher_with_groups_of_its_own_is_in_no_group_of_the_students(families: dict[str, dict[str, Any]]) -> None:
    """Modules that are given none take megatron's global ones, which are the student's."""
    assert {name: found["in the student's groups"] for name, found in families.items()} == {name: [] for name in families}


@pytest.mark.skipif(PROBLEM is not None, reason=f"Transformer Engine: {PROBLEM}")
def test_no_attention_keeps_scores(families: dict[str, dict[str, Any]]) -> None:
    """In fp32 Transformer Engine's own would: FlashAttention and cuDNN take 16 bits."""
    expected = {"torch.bfloat16": ["TEDotProductAttention"], "torch.float32": ["CausalAttention"]}
    assert {name: found["attention"] for name, found in families.items()} == {name: expected for name in families}


@pytest.mark.skipif(PROBLEM is not None, reason=f"Transformer Engine: {PROBLEM}")
def test_every_family_is_saved_under_the_same_names_and_shapes_and_loads_under_the_other_spec(families: dict[str, dict[str, Any]]) -> None:
    assert len(families) == 8
    for name, found in families.items():
        assert len(found["engine"]) > 20 and found["engine"] == found["local"], name
        assert found["differ after two loads"] == [], name
