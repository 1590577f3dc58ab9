"""What FP8 does to the demo's distillation (SmolLM2-135M → 97M): KL and perplexity on held-out text after equal steps, and what emulating it costs.

The same samples, seeds and steps in the recipe's precision and with teacher and student in each emulated scaling, on one process.
Distillations that are finished below --folder are not made again. Needs the demo's model and text (`bash launch/demo.sh`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from common import minitron, result_of, write_result

NAME = "smollm2_135m_to_97m"
INPUTS = ("import", "data", "importance", "prune")
FIXED = (
    "data.out_of_domain=[]",
    "parallel.pipeline=1",
    "importance.samples=8",
    "distill.global_batch=4",
    "distill.micro_batch=2",
    "distill.learning_rate={peak: 3e-4, minimum: 3e-5, warmup_steps: 2}",
    "distill.save_every_steps=1000",
    "distill.validate_every_steps=1000",
)
VARIANTS = {
    "none": (),
    "delayed": ("fp8.student=delayed", "fp8.teacher=tensorwise", "fp8.emulated=true"),
    "tensorwise": ("fp8.student=tensorwise", "fp8.teacher=tensorwise", "fp8.emulated=true"),
    "blockwise": ("fp8.student=blockwise", "fp8.teacher=blockwise", "fp8.emulated=true"),
    "mxfp8": ("fp8.student=mxfp8", "fp8.teacher=mxfp8", "fp8.emulated=true"),
}
"""Of student and teacher; a frozen teacher has no delayed scales."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/fp8_emulation"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    fixed = (*FIXED, f"distill.steps={options.steps}")
    for stage in INPUTS:
        minitron(stage, *fixed, f"runs={options.folder / 'none'}")
    for name in options.only:
        distil(options.folder, name, fixed)
    report({name: figures(options.folder / name) for name in options.only}, options.steps)


def distil(folder: Path, name: str, fixed: tuple[str, ...]) -> None:
    """In a run folder of its own, with the inputs of the first."""
    if not (folder / name).exists():
        for stage in INPUTS:
            shutil.copytree(folder / "none" / NAME / stage, folder / name / NAME / stage, copy_function=os.link)
    minitron("distill", *fixed, f"runs={folder / name}", *VARIANTS[name])


def figures(runs: Path) -> dict[str, float]:
    log = [json.loads(line) for line in (runs / NAME / "distill" / "metrics.jsonl").read_text().splitlines()]
    before, after = log[0]["validation"], result_of(runs, "distill")["validation"]
    seconds = statistics.median(record["seconds"] for record in log if record["step"] > 1)
    return {
        "kl_before": before["forward_kl"],
        "kl": after["forward_kl"],
        "perplexity_before": before["perplexity"],
        "perplexity": after["perplexity"],
        "seconds": seconds,
    }


def report(found: dict[str, dict[str, Any]], steps: int) -> None:
    rows = [
        f"| {name} | {row['kl_before']:.4f} | {row['kl']:.4f} | {row['perplexity_before']:.2f} | {row['perplexity']:.2f} | {row['seconds']:.1f} |"
        for name, row in found.items()
    ]
    text = "\n".join(
        [
            f"{steps} steps of 4 samples of 128 tokens, one process; KL to the teacher and perplexity on 16 held-out windows of 128 tokens, each",
            "model in the scaling of its row (delayed: the teacher is tensorwise). Seconds are medians, with whatever else the machine was doing.",
            "",
            "| emulated FP8 | KL, pruned | KL, distilled | perplexity, pruned | perplexity, distilled | s a step |",
            "|---|--:|--:|--:|--:|--:|",
            *rows,
        ]
    )
    write_result("fp8_emulation", "Emulated FP8 in the demo's distillation", text, found)


if __name__ == "__main__":
    main()
