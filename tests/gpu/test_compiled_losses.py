"""What torch.compile makes of the losses is what they are; on CUDA, and on the CPU, where it shows that they can be compiled whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")),
        pytest.param("cpu", marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")]),
    ],
)
def test_compiled_losses_and_gradients_are_the_uncompiled_ones(device: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("compiled_losses.py")), device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    apart = json.loads(done.stdout.splitlines()[-1])
    assert len(apart) == 3
    assert all(distance < 1e-5 for distance in apart.values()), apart  # fp32 sums of 1,503 terms in another order
