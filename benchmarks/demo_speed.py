"""Tokens a second of the demo's distillation (SmolLM2-135M → 97M, PP=2 on two CPU processes), ours now beside our first version.

Each version makes its own inputs from the demo's model and text, by the same settings, then all distil at the same time, but by turns: while
one works the others are stopped. The recipe has become another as well, with more samples a step: what a step costs whatever its size is shared by
more tokens, and both stages of the pipeline wait less. Ours with the first version's samples a step stands beside it.
Claim: ≥ 1.5 × the first version's tokens/s.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from pathlib import Path

from common import write_result
from turns import STEPS_A_TURN, TURNS, Distillation, by_turns

ROOT = Path(__file__).resolve().parent.parent
FIRST = "6d5f98960e"  # the last commit before layouts other than one process, DP and PP
INPUTS = ("import", "data", "importance", "prune")
SETTINGS = ("importance.samples=8", "distill.validation_samples=1")
AS_IN_THE_FIRST = ("distill.global_batch=2", "distill.steps=150", "distill.learning_rate={peak: 3e-4, minimum: 3e-5, warmup_steps: 15}")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        versions = [
            Distillation(f"first version ({FIRST[:7]})", first_version(folder), folder / "runs_first", *SETTINGS),
            Distillation("now, 2 samples a step as in the first", ROOT, folder / "runs_same", *SETTINGS, *AS_IN_THE_FIRST),
            Distillation("now, by its recipe", ROOT, folder / "runs_now", *SETTINGS),
        ]
        for version in versions:
            version.runs.mkdir()
            version.make_inputs(INPUTS)
        by_turns(versions)
        report(*versions)


def first_version(folder: Path) -> Path:
    """Its files, in a folder of their own, with the demo's inputs."""
    tree = folder / "first"
    tree.mkdir()
    archive = subprocess.run(["git", "archive", FIRST], check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x"], check=True, cwd=tree, input=archive)
    (tree / ".demo").symlink_to(ROOT / ".demo")
    return tree


def report(first: Distillation, same: Distillation, now: Distillation) -> None:
    pairs = list(zip(first.records(), same.records(), strict=False))[:5]
    apart = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs)
    rows = [
        f"| {x.name} | {x.tokens} | {statistics.median(x.seconds):.3f} | {min(x.seconds):.3f} – {max(x.seconds):.3f} | {x.speed:.0f} "
        f"| {x.speed / first.speed:.2f} |"
        for x in (first, same, now)
    ]
    text = "\n".join(
        [
            f"bf16, PP=2, one thread each; {TURNS} turns each of {STEPS_A_TURN} steps. With equal batches the losses of the first five steps differ "
            f"by {apart:.1e} at most (relative).",
            "",
            "| version | tokens a step | seconds a step (median) | from – to | tokens/s | ratio |",
            "|---|--:|--:|--:|--:|--:|",
            *rows,
        ]
    )
    figures = {
        "tokens_per_second": {"first": first.speed, "same_batch": same.speed, "now": now.speed},
        "ratio": now.speed / first.speed,
        "ratio_same_batch": same.speed / first.speed,
        "claim": 1.5,
        "loss_difference": apart,
    }
    write_result("demo_speed", "The demo's distillation, now and in the first version", text, figures)


if __name__ == "__main__":
    main()
