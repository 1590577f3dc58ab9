"""FP8 weights of Transformer Engine's own classes, without a driver where its CUDA build imports: rounded.py says what stands for its kernels."""

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
def found() -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("rounded.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    read: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return read


needs_no_gpu = pytest.mark.skipif(
    PROBLEM is not None or torch.cuda.is_available(), reason=f"Transformer Engine: {PROBLEM}" if PROBLEM else "run_all.sh asks the GPU itself"
)


@needs_no_gpu
def test_a_teachers_fp8_matrices_take_a_byte_an_element_and_have_no_further_copies(found: dict[str, Any]) -> None:
    teacher = found["teacher"]
    assert teacher["matrices"] == 4 * 5 and teacher["further copies"] == []
    assert teacher["bytes an element"] == pytest.approx(1, abs=0.01)  # a scale of four bytes beside each
    assert teacher["worst"] <= 1 / 16  # e4m3: half of a step of 2^-3


@needs_no_gpu
def test_a_students_fp8_weights_are_published_and_continued_to_the_bit(found: dict[str, Any]) -> None:
    assert found["student"] == {"published otherwise": [], "continued otherwise": []}
