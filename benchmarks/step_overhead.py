"""A distillation step against its parts alone, and against ModelOpt's step.

Claims: at most 1.05 × (teacher forward with its output layer alone + student step with plain cross-entropy alone), in one process, PP=2,
PP=2 × VPP=2 and TP=2; at PP=2 at most ModelOpt's time. fp32, random weights, the same for all; the processes of a layout are started
once, and what is compared takes turns in them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from common import write_result
from peer import in_peer_environment


def main() -> None:
    in_peer_environment()
    from step_shapes import LAYOUTS

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        report({name: measured(name, parallel.processes, folder) for name, parallel in LAYOUTS.items() if name in (sys.argv[1:] or LAYOUTS)})


def prepare(folder: Path) -> None:
    """Random weights and text."""
    import numpy as np
    import torch
    from step_shapes import STUDENT, TEACHER

    from minitron_megatron.checkpoint.tensors import tensor_table
    from minitron_megatron.platform import activate

    activate("cpu")
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from minitron_megatron.checkpoint.torch_dist import write_torch_dist

    for seed, (name, arch) in enumerate({"teacher": TEACHER, "student": STUDENT}.items()):
        dice = torch.Generator().manual_seed(seed)

        def draw(row: Any, arch: Any = arch, dice: Any = dice) -> Any:
            noise = 0.02 * torch.randn(row.shape(arch), generator=dice)
            return noise + 1 if len(row.axes) == 1 else noise

        write_torch_dist(folder / name, tensor_table(arch), arch, dtype=lambda row: torch.float32, read=draw)
    builder = IndexedDatasetBuilder(f"{folder / 'train'}.bin", dtype=np.uint16)
    for document in np.random.default_rng(1).integers(0, TEACHER.vocab, (500, 1000)):
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{folder / 'train'}.idx")


def measured(name: str, processes: int, folder: Path) -> dict[str, Any]:
    from minitron_megatron.launcher import worker_environment

    print(f"{name} …", flush=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, str(Path(__file__).with_name("step_worker.py")), name, str(folder)]
    import os

    subprocess.run(command, check=True, env={**os.environ, **worker_environment(processes)})
    return json.loads((folder / f"{name}.json").read_text())


def report(found: dict[str, dict[str, Any]]) -> None:
    for name, values in found.items():
        print(name, {key: round(median(item), 4) for key, item in values["seconds"].items()}, values)


if __name__ == "__main__":
    main()
