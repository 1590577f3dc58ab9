"""Stored teacher outputs against the live teacher: bytes a token, time of a step, and KL to the teacher on held-out text after equal steps.

Claim: a step that reads the teacher's 64 likeliest tokens takes at most 0.75 of one with the live teacher, from less than 256 bytes a token.
One process, all stages of the demo's recipe in it; then the distillations whose steps are timed, by turns.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RECIPE, write_result
from turns import MOST_STEPS, NAME, STEPS_A_TURN, TURNS, Distillation, by_turns

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact, find_artifact
from minitron_megatron.chain import STAGES, run_folder, run_stage
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.parallel.world import World, distributed_world
from minitron_megatron.worker import prepare  # it makes megatron-core run here: what imports megatron is imported behind it

ROOT = Path(__file__).resolve().parent.parent
STEPS = 20
FIXED = ["parallel.pipeline=1", "importance.samples=16", "distill.global_batch=2", "distill.micro_batch=2"]
FIXED += [
    "distill.learning_rate={peak: 3e-4, minimum: 3e-5, warmup_steps: 4}",
    "distill.validation_samples=4",
    "distill.save_every_steps=1000",
    "distill.validate_every_steps=1000",
    f"teacher_logits.samples={2 * (MOST_STEPS + 1)}",
]
LENGTH = f"distill.steps={STEPS}"
STORED = "distill.teacher_outputs=stored"
VARIANTS: dict[str, list[str]] = {
    "live": [],
    **{f"top {k}": [STORED, f"teacher_logits.k={k}"] for k in (16, 64, 256, 1024)},
    "50 draws": [STORED, "teacher_logits={kind: sample, draws: 50}"],
}
TIMED = ("live", "top 64", "top 1024")
"""As many as fit into memory beside each other."""
HELDOUT_WINDOWS = 32


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fixed = [*FIXED, LENGTH, f"runs={folder}"]
        _, platform = prepare(RECIPE, fixed)
        with distributed_world(platform) as world:
            for stage in ("import", "data", "importance", "prune"):
                publish(stage, fixed, world)
            found = {name: trained(name, [*fixed, *overrides], world) for name, overrides in VARIANTS.items()}
            for name, (kl, error) in heldout_kl(fixed, world).items():
                found[name] |= {"kl": kl, "kl_stderr": error}
        timed = [Distillation(name, ROOT, of_timed(folder, name), *FIXED, *VARIANTS[name], f"distill.steps={MOST_STEPS + 1}") for name in TIMED]
        by_turns(timed)
        for one in timed:
            found[one.name]["step_seconds"] = statistics.median(one.seconds)
        report(found)


def publish(stage: str, overrides: list[str], world: World) -> Artifact:
    from minitron_megatron.parallel.layout import destroy_layout

    recipe, _ = prepare(RECIPE, overrides)
    began = time.monotonic()
    run_stage(STAGES[stage], recipe, RECIPE, world)
    destroy_layout()
    print(f"{stage} {' '.join(item for item in overrides if item not in FIXED)}: {time.monotonic() - began:.1f} s", flush=True)
    artifact = find_artifact(run_folder(recipe), stage)
    if artifact is None:
        raise RuntimeError(f"stage {stage} published nothing")
    return artifact


def trained(name: str, overrides: list[str], world: World) -> dict[str, Any]:
    """Of what is stored the bytes a token and the seconds that it took; the run's weights are kept under its name."""
    figures: dict[str, Any] = {}
    if STORED in overrides:
        stored = publish("teacher-logits", overrides, world)
        figures = {"bytes_per_token": stored.result["bytes_per_token"], "store_seconds": stored.manifest["seconds"]}
    artifact = publish("distill", overrides, world)
    run = artifact.path.parent
    artifact.path.rename(kept(run, name))
    if name in TIMED:
        shutil.copytree(run, of_timed(str(run.parent), name) / NAME, ignore=shutil.ignore_patterns("distilled *", "importance"))
    return figures


def of_timed(folder: str, name: str) -> Path:
    """Its runs: the same artifacts, for a distillation of its own."""
    return Path(folder) / f"timed {name}"


def kept(folder: Path, name: str) -> Path:
    return folder / f"distilled {name}"


def heldout_kl(overrides: list[str], world: World) -> dict[str, tuple[float, float]]:
    """Mean KL(teacher ‖ student) over the whole vocabulary, nats a token, with its standard error over windows."""
    from minitron_megatron.data.samples import evaluation_windows
    from minitron_megatron.evaluate.compare import compare, mean_and_error
    from minitron_megatron.parallel.layout import destroy_layout, global_layout

    recipe, _ = prepare(RECIPE, overrides)
    folder, layout = run_folder(recipe), global_layout(Parallel(), world)
    teacher = loaded(folder / "import", recipe, layout, world)
    length = recipe.distill.sequence_length
    windows = evaluation_windows(folder / "data" / "heldout", sequence_length=length, tokens=HELDOUT_WINDOWS * length)
    found = {}
    for name in ["pruned", *VARIANTS]:
        path = folder / "prune" if name == "pruned" else kept(folder, name)
        models = {"teacher": teacher, "student": loaded(path, recipe, layout, world)}
        kl = mean_and_error(compare(models, windows, world, what=name)["student"][:, 1] / length)
        found[name] = kl["value"], kl["stderr"]
    pruned = found.pop("pruned")
    print(f"pruned, before any step: KL {pruned[0]:.3f} ± {pruned[1]:.3f}")
    destroy_layout()
    return found


def loaded(path: Path, recipe: Recipe, layout: Any, world: World) -> Any:
    from minitron_megatron.checkpoint.sharded import load_model
    from minitron_megatron.model.build import build_model
    from minitron_megatron.model.precision import torch_dtype

    arch = Architecture.from_dict(json.loads((path / "result.json").read_text())["architecture"])
    model = build_model(arch, layout, world.platform, torch_dtype(recipe.precision))
    load_model(model, path / "checkpoint")
    return model.frozen()


def report(found: dict[str, dict[str, Any]]) -> None:
    live = found["live"]["step_seconds"]

    def row(name: str) -> str:
        figures = found[name]
        size = f"{figures['bytes_per_token']:.0f}" if "bytes_per_token" in figures else "–"
        step = figures.get("step_seconds")
        time = f"{step:.2f} | {step / live:.2f}" if step else "– | –"
        return f"| {name} | {size} | {time} | {figures['kl']:.3f} ± {figures['kl_stderr']:.3f} |"

    text = "\n".join(
        [
            f"SmolLM2-135M → 97M, {STEPS} steps of 2 × 128 tokens in the same order, one process; seconds: median of {TURNS} turns of "
            f"{STEPS_A_TURN} steps. KL to the live teacher over the whole vocabulary on {HELDOUT_WINDOWS} held-out windows, nats a token; "
            "± its standard error. "
            "All logits of a token in bf16 are 98,304 bytes.",
            "",
            "| teacher | bytes a token | seconds a step | ÷ live | KL after the last step |",
            "|---|--:|--:|--:|--:|",
            *(row(name) for name in found),
        ]
    )
    figures = {
        "step_top_64": found["top 64"]["step_seconds"] / live,
        "step_top_1024": found["top 1024"]["step_seconds"] / live,
        **{f"bytes_{name.replace(' ', '_')}": each["bytes_per_token"] for name, each in found.items() if "bytes_per_token" in each},
        **{f"kl_{name.replace(' ', '_').replace(',', '')}": each["kl"] for name, each in found.items()},
    }
    write_result("stored_teacher", "Stored teacher outputs against the live teacher", text, figures)


if __name__ == "__main__":
    main()
