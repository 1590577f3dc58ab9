"""What import, prune and export hold in memory: less than the largest tensor, measured in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_megatron.launcher import worker_environment

LARGEST_MB = 65_536 * 1024 * 4 / 1e6
CHILD = """
import json, sys, threading
from pathlib import Path

import torch
from safetensors.torch import save_file

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource, write_huggingface
from minitron_megatron.checkpoint.tensors import hf_shapes, tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, write_torch_dist
from minitron_megatron.prune.plan import make_plan
from minitron_megatron.prune.stream import apply_plan
from minitron_megatron.scores.units import random_scores

folder = Path(sys.argv[1])
arch = Architecture("llama", 1, 1024, 16, 4, 64, 2048, 65_536, True, 64, 1e-5, 10_000.0)
if sys.argv[2] == "write":
    shapes = {name: shape for row in tensor_table(arch) for name, shape in zip(row.hf_names, hf_shapes(row, arch))}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    sys.exit()


def resident_mb():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1e3


def peak_of(work):
    before, seen, ended = resident_mb(), [0.0], threading.Event()

    def watch():
        while not ended.wait(0.002):
            seen.append(resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    ended.set()
    watcher.join()
    return max(seen) - before


def imported():
    source = HuggingFaceSource(folder, arch)
    write_torch_dist(folder / "whole", tensor_table(arch), arch, dtype=source.dtype, read=source.read)


plan = make_plan(random_scores(arch, 0), arch, arch.resized(hidden=768, ffn=1024))
(folder / "back").mkdir()
print(json.dumps({
    "import": peak_of(imported),
    "prune": peak_of(lambda: apply_plan(MegatronSource(folder / "whole", arch), plan, folder / "cut")),
    "export": peak_of(lambda: write_huggingface(folder / "back", MegatronSource(folder / "whole", arch), arch)),
}))
"""


@pytest.mark.slow
def test_no_stream_holds_as_much_as_the_largest_tensor(tmp_path: Path) -> None:
    """Slabs of 16 MB: three ahead, one that is written and one whose digest is made; and what pruning cuts them from."""
    environment = {**os.environ, **worker_environment(2, streams=True)}
    for what in ("write", "measure"):
        told = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), what], check=True, env=environment, stdout=subprocess.PIPE).stdout
    peaks = json.loads(told)
    assert peaks.keys() == {"import", "prune", "export"}
    assert all(30 < peak < 0.6 * LARGEST_MB for peak in peaks.values()), peaks
