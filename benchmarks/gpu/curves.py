"""SmolLM2 distilled in bf16 and in FP8: KL to the teacher and perplexity of held-out text over the tokens seen, drawn into one figure.

The stages before the distillation run once; then each precision distils the same student on the same tokens, for so many minutes. Every command
draws all precisions that have been measured into --out, so that each may be a command of its own. FFN and heads of this model are multiples of 16;
blockwise scaling asks for 128 and is left out.

    bash launch/demo.sh                                             # once, anywhere: brings the model and the text into .demo
    bash benchmarks/gpu/run.sh curves --variants bf16               # about 10 minutes each
    bash benchmarks/gpu/run.sh curves --variants tensorwise
    bash benchmarks/gpu/run.sh curves --variants delayed
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from curves_figure import curves_svg
from options import command_line, folder_of, require_engine
from shapes import BF16, ROOT
from writer import table, write

from minitron_megatron.failure import STOPPED

RECIPE = ROOT / "configs" / "smollm2_135m_to_97m.yaml"
BEFORE = ("import", "data", "importance", "prune")
FP8 = {
    BF16: (),
    "tensorwise": ("fp8.teacher=tensorwise", "fp8.student=tensorwise"),
    "delayed": ("fp8.teacher=tensorwise", "fp8.student=delayed"),
}
LARGE = (
    *("distill.steps=3000", "distill.sequence_length=512", "distill.global_batch=64", "distill.micro_batch=16"),
    *("distill.validate_every_steps=100", "distill.validation_samples=64", "distill.save_every_steps=1000"),
    "distill.learning_rate={peak: 6.0e-4, minimum: 6.0e-5, warmup_steps: 50}",
)
SAVING_SECONDS = 90
"""For the checkpoint of a run that is ended."""
TINY = ("distill.steps=4", "distill.validate_every_steps=2", "distill.validation_samples=2", "distill.save_every_steps=4")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--variants", nargs="+", choices=list(FP8), default=list(FP8))
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--runs", type=Path, default=None, help="folder of the runs; kept, so that the next command finds the first stages there")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which a distillation is ended, the stages before it counted in")
    parser.add_argument("--set", nargs="*", default=[], help="more settings of the recipe, as KEY=VALUE")
    asked = parser.parse_args()
    require_engine(asked.device)
    with tempfile.TemporaryDirectory() as scratch:
        runs = (asked.runs or Path(scratch)).resolve()
        found = {name: distilled(name, runs, asked) for name in asked.variants}
    report(found | earlier(asked, found), asked)


def settings(name: str, runs: Path, asked: argparse.Namespace) -> list[str]:
    """On one process; a CPU rounds as FP8 would."""
    emulated = ["fp8.emulated=true"] if asked.device == "cpu" and FP8[name] else []
    where = [f"runs={runs / name.replace(' ', '_')}", f"platform={asked.device}", "precision=bf16", "parallel.pipeline=1"]
    where += ["data.out_of_domain=[]", "evaluate.tasks=[]"]  # what only an evaluation would read need not be there
    return [*where, *FP8[name], *emulated, *(TINY if asked.tiny else LARGE), *asked.set]


def distilled(name: str, runs: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """The run's validations, and the speed of its steps."""
    ends = time.monotonic() + asked.minutes * 60
    prepare(name, runs, asked)
    ended = until(ends, command("distill", settings(name, runs, asked), asked))
    log = next((runs / name).glob("*/*distill*/metrics.jsonl"), None)  # an unfinished one lies in .distill.partial
    if ended not in (0, STOPPED) or log is None:
        raise RuntimeError(f"{name}: the distillation ended with {ended}; its message stands above")
    return of_log([json.loads(line) for line in log.read_text().splitlines()])


def prepare(name: str, runs: Path, asked: argparse.Namespace) -> None:
    """The stages before, once; what FP8 asks of sizes is part of prune's identity: the same cut under the name that distill looks for."""
    first = runs / BF16
    for stage in BEFORE:
        if not any(first.glob(f"*/{stage}/manifest.json")):  # of a command that was cut off the rest
            subprocess.run(command(stage, settings(BF16, runs, asked), asked), check=True, env=environment())
    if name != BF16:
        # no distillation of bf16's, finished or stopped: its log would pass for this one's
        shutil.copytree(first, runs / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("distill", ".*.partial"))
        subprocess.run(command("prune", settings(name, runs, asked), asked), check=True, env=environment())


def command(stage: str, overrides: list[str], asked: argparse.Namespace) -> list[str]:
    print("$ minitron", stage, asked.recipe.name, *overrides, flush=True)
    return [sys.executable, "-m", "minitron_megatron.cli", stage, str(asked.recipe), *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def until(ends: float, started: list[str]) -> int:
    """Ends it as a scheduler would once the time is over: it saves, and what it has logged stays. Its exit code."""
    process = psutil.Popen(started, env=environment(), cwd=ROOT)
    while process.poll() is None and time.monotonic() < ends:
        time.sleep(0.2)
    if process.poll() is not None:
        return int(process.returncode)
    process.send_signal(signal.SIGTERM)
    try:
        return int(process.wait(SAVING_SECONDS))
    except psutil.TimeoutExpired:
        kill(process)
        return STOPPED  # what it has logged is what is wanted


def kill(process: psutil.Popen) -> None:
    """With what it has started: a worker would keep the GPU."""
    for one in [*process.children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def of_log(records: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [record for record in records if record["step"]]
    tokens_a_step = median(record["tokens_per_second"] * record["seconds"] for record in steps)
    points = [
        {"tokens": round(record["step"] * tokens_a_step), "step": record["step"], **record["validation"]}
        for record in records
        if "validation" in record
    ]
    speed, memory = median(record["tokens_per_second"] for record in steps), max(record["memory_gib"] for record in steps)
    return {"points": points, "steps": len(steps), "tokens_per_second": speed, "memory_gib": memory, "losses": [record["loss"] for record in steps]}


def earlier(asked: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    """What other commands have measured into the same folder."""
    folder = folder_of(asked)
    path = folder / "gpu_curves.json" if folder else None
    before = json.loads(path.read_text())["figures"] if path and path.is_file() else {}
    return {name: value for name, value in before.items() if name not in found}


def report(found: dict[str, Any], asked: argparse.Namespace) -> None:
    found = {name: found[name] for name in FP8 if name in found}
    reached = min(x["points"][-1]["step"] for x in found.values())
    last = {name: next(point for point in x["points"] if point["step"] == reached) for name, x in found.items()}
    plain = last.get(BF16)
    rows = [
        [
            name,
            str(reached),
            f"{point['forward_kl']:.4f}",
            f"{point['perplexity']:.3f}",
            f"{point['forward_kl'] / plain['forward_kl'] - 1:+.2%}" if plain else "–",
            f"{found[name]['tokens_per_second']:,.0f}",
            f"{found[name]['memory_gib']:.2f}",
        ]
        for name, point in last.items()
    ]
    body = [
        f"{asked.recipe.stem}: each precision distils the same student on the same tokens; validation on held-out windows, at the last step that all "
        "reached. FP8: teacher tensorwise, student as named.",
        "",
        *table(("student", "step", "KL to the teacher", "perplexity", "KL over bf16", "tokens/s", "peak GiB"), rows),
        "",
        "![KL and perplexity over tokens](gpu_curves.svg)",
    ]
    folder = folder_of(asked)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "gpu_curves.svg").write_text(curves_svg({name: x["points"] for name, x in found.items()}))
    write("curves", "SmolLM2 distilled in bf16 and in FP8", body, found, asked)


if __name__ == "__main__":
    main()
