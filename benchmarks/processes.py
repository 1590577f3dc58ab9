"""The demo's importance, pruning and first 20 distillation steps with one process, DP=2 and PP=2, fp32, one thread each.

Claims: the same score bits for DP and PP, the same pruned weights from the same scores, losses equal to 1e-4 relative.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from common import minitron, result_of, write_result

NAME = "smollm2_135m_to_97m"
LAYOUTS = {"one process": (1, 1), "DP=2": (1, 2), "PP=2": (2, 1)}
SETTINGS = [
    "precision=fp32",
    "distill.steps=20",
    "distill.global_batch=2",
    "distill.learning_rate={peak: 3e-4, minimum: 3e-5, warmup_steps: 4}",
    "distill.validate_every_steps=20",
    "distill.validation_samples=4",
]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, found = Path(folder) / "first", {}
        for name, (pipeline, data) in LAYOUTS.items():
            runs = Path(folder) / name.replace(" ", "_")
            found[name] = run_layout(runs, pipeline, data, scores_of=first if name != "one process" else None)
            if name == "one process":
                runs.rename(first)
        report(found)


def run_layout(runs: Path, pipeline: int, data: int, *, scores_of: Path | None) -> dict[str, Any]:
    overrides = [f"runs={runs}", f"parallel.pipeline={pipeline}", f"parallel.data={data}", *SETTINGS]
    for stage in ("import", "data", "importance", "prune"):
        minitron(stage, *overrides, environment={"OMP_NUM_THREADS": "1"})
    found = {"scores": digest(runs / NAME / "importance" / "scores.safetensors"), "weights": result_of(runs, "prune")["weights_sha256"]}
    if scores_of:  # distil from the first layout's artifacts, so that only the layout of the training differs
        shutil.rmtree(runs)
        shutil.copytree(scores_of, runs)
        shutil.rmtree(runs / NAME / "distill")
    minitron("distill", *overrides, environment={"OMP_NUM_THREADS": "1"})
    lines = (runs / NAME / "distill" / "metrics.jsonl").read_text().splitlines()
    found["losses"] = [record["loss"] for record in map(json.loads, lines) if record["step"]]
    return found


def digest(path: Path) -> str:
    """Of the tensors alone: what the header says beside them is no claim of this benchmark."""
    from safetensors.torch import load_file

    hashed = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        hashed.update(name.encode() + tensor.numpy().tobytes())
    return hashed.hexdigest()


def report(found: dict[str, dict[str, Any]]) -> None:
    reference = found["one process"]
    figures, rows = {}, []
    for name, values in found.items():
        worst = max(abs(a - b) / abs(b) for a, b in zip(values["losses"], reference["losses"], strict=True))
        same = {key: values[key] == reference[key] for key in ("scores", "weights")}
        figures[name] = {**same, "worst_relative_loss_difference": worst}
        rows.append(f"| {name} | {'same bits' if same['scores'] else 'differ'} | {'same bits' if same['weights'] else 'differ'} | {worst:.1e} |")
    text = "\n".join(
        [
            "SmolLM2-135M → 97M, fp32, OMP_NUM_THREADS=1, 20 steps × 2 × 128 tokens; each layout against one process.",
            "",
            "| layout | importance statistics | pruned weights | worst relative difference of a step's loss |",
            "|---|---|---|--:|",
            *rows,
        ]
    )
    write_result("processes", "One process, data parallel, pipeline parallel", text, figures)


if __name__ == "__main__":
    main()
