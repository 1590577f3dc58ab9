"""A distillation step against its parts alone, and against ModelOpt's step.

Claims: at most 1.05 × (teacher forward with its output layer alone + student step with plain cross-entropy alone), in one process, PP=2,
PP=2 × VPP=2 and TP=2; at PP=2 at most ModelOpt's time. fp32, random weights, the same for all; the processes of a layout are started
once, and what is compared takes turns in them. `step_overhead.py LAYOUT…` measures some of the layouts and writes no result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
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
        wanted = sys.argv[1:] or list(LAYOUTS)
        report({name: measured(name, LAYOUTS[name].processes, folder) for name in wanted})


def random_rows(row: Any, rows: range | None = None, *, arch: Any, dice: Any) -> Any:
    import torch

    length, *others = row.shape(arch)
    noise = 0.02 * torch.randn(length if rows is None else len(rows), *others, generator=dice)
    return noise + 1 if len(row.axes) == 1 else noise


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

        draw = partial(random_rows, arch=arch, dice=dice)
        write_torch_dist(folder / name, tensor_table(arch), arch, dtype=lambda row: torch.float32, read=draw)
    builder = IndexedDatasetBuilder(f"{folder / 'train'}.bin", dtype=np.uint16)
    for document in np.random.default_rng(1).integers(0, TEACHER.vocab, (500, 1000)):
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{folder / 'train'}.idx")


def measured(name: str, processes: int, folder: Path) -> dict[str, Any]:
    """Starts the layout's processes and waits for what they found."""
    from minitron_megatron.launcher import worker_environment

    print(f"{name} …", flush=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, str(Path(__file__).with_name("step_worker.py")), name, str(folder)]
    subprocess.run(command, check=True, env={**os.environ, **worker_environment(processes)})
    return json.loads((folder / f"{name}.json").read_text())


def report(found: dict[str, dict[str, Any]]) -> None:
    """The table by layout, the simulated steps beside the measured ones."""
    from step_shapes import MICRO_BATCHES, OURS, PEER, ROUNDS, SETTINGS, STUDENT, STUDENT_ALONE, TEACHER, TEACHER_ALONE

    figures: dict[str, Any] = {}
    rows, points = [], []
    for name, values in found.items():
        agree(name, values["losses"])
        taken = {what: median(seconds) for what, seconds in values["seconds"].items()}
        parts, peer = taken[TEACHER_ALONE] + taken[STUDENT_ALONE], taken.get(PEER)
        over = {"over_parts": taken[OURS] / parts, **({"over_modelopt": taken[OURS] / peer} if peer else {})}
        figures[name] = {"seconds": taken, "simulated": values["simulated"], **over}
        against = f"{peer:.2f} s | {over['over_modelopt']:.3f}" if peer else "– | –"
        seconds = " | ".join(f"{taken[what]:.2f} s" for what in (OURS, TEACHER_ALONE, STUDENT_ALONE))
        rows.append(f"| {name} | {seconds} | {over['over_parts']:.3f} | {against} |")
        for what, point in values["simulated"].items():
            expected = point["seconds"]
            points.append(f"| {name} | {what} | {expected:.2f} s | {taken[what]:.2f} s | {taken[what] / expected:.2f} |")
    shapes = f"{TEACHER.layers} layers, hidden {TEACHER.hidden} → {STUDENT.hidden}, ffn {TEACHER.ffn} → {STUDENT.ffn}, V {TEACHER.vocab:,}"
    text = [
        f"Llama shapes, {shapes}; {MICRO_BATCHES} × {SETTINGS.sequence_length} tokens a step, fp32, Adam in all; medians of {ROUNDS} rounds, in "
        "turns in the same processes, seconds until the last one is through. The teacher has the student's layout; its logits are made and dropped. "
        "First losses are equal: ours and ModelOpt's KL, ours and the plain student's cross-entropy.",
        "",
        "| layout | distillation step | teacher alone | student alone | over their sum | ModelOpt | over ModelOpt |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *rows,
        "",
        "The step as `minitron plan` simulates it, from each stage's passes of one micro-batch, measured alone, and the optimizer's step:",
        "",
        "| layout | what | simulated | measured | measured over simulated |",
        "|---|---|--:|--:|--:|",
        *points,
    ]
    if sys.argv[1:]:
        print("\n".join(text), json.dumps(figures), sep="\n")
    else:
        write_result("step_overhead", "A distillation step against its parts, and against ModelOpt's", "\n".join(text), figures)


def agree(name: str, losses: dict[str, float]) -> None:
    """All began with the same weights and samples; raises RuntimeError where a first loss says otherwise."""
    from step_shapes import OURS, PEER, STUDENT_ALONE, WHOLE_TEACHER

    pairs = {STUDENT_ALONE: f"{OURS}: cross-entropy", PEER: OURS, WHOLE_TEACHER: OURS}
    for what, ours in pairs.items():
        if what in losses and abs(losses[what] - losses[ours]) > 1e-4 * abs(losses[ours]):
            raise RuntimeError(f"{name}: the first loss of '{what}' is {losses[what]}, ours is {losses[ours]}")


if __name__ == "__main__":
    main()
