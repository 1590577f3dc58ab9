"""A run as the stages leave it on disk, with figures of realistic size: the page of it is made (and seen) in a second.

`python tests/unit/report/conftest.py FOLDER` writes the page of it into FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.artifact import Artifact
from minitron_megatron.config.schema import Recipe
from minitron_megatron.report.stage import run

SOURCE = Architecture("llama", 30, 576, 9, 3, 64, 1536, 49152, True, 8192, 1e-5, 100000.0)
TARGET = SOURCE.resized(layers=26, ffn=1024)
DROPPED = (10, 18, 19, 21)
STEPS = 150


@pytest.fixture
def recipe() -> Recipe:
    return fake_recipe()


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    """Artifacts of every stage that the report reads."""
    return write_run(tmp_path / "run")


def fake_recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "smollm2_135m_to_97m",
            "model": {"path": ".demo/model"},
            "data": {"train": [".demo/text/sotu/*.txt"], "out_of_domain": [".demo/text/python_docs.jsonl"]},
            "parallel": {"pipeline": 2},
            "prune": {"target": {"ffn": 1024, "layers": 26}},
            "distill": {"steps": STEPS},
        }
    )


def write_run(folder: Path) -> dict[str, Artifact]:
    """Artifacts of every stage that the report reads, below a folder."""
    random = np.random.default_rng(0)
    scores = _scores(random)
    kept = [layer for layer in range(SOURCE.layers) if layer not in DROPPED]
    plan = {
        "kept_layers": kept,
        "ffn": {str(layer): sorted(np.argsort(scores["ffn"][layer])[-TARGET.ffn :].tolist()) for layer in kept},
        "heads": {str(layer): list(range(SOURCE.heads)) for layer in kept},
        "channels": list(range(SOURCE.hidden)),
        "source": SOURCE.to_dict(),
        "target": TARGET.to_dict(),
    }
    lines = "".join(json.dumps(step) + "\n" for step in _steps(random))
    shape = {"architecture": SOURCE.to_dict(), "parameters": parameter_count(SOURCE)}
    cut = {
        "architecture": TARGET.to_dict(),
        "parameters": parameter_count(TARGET),
        "parameters_before": parameter_count(SOURCE),
    }
    return {
        "import": _artifact(folder, "import", shape, {}),
        "importance": _artifact(folder, "importance", {}, {"summary.json": json.dumps(scores)}),
        "prune": _artifact(folder, "prune", cut, {"plan.json": json.dumps(plan)}),
        "distill": _artifact(folder, "distill", {}, {"metrics.jsonl": lines}),
        "evaluate": _artifact(folder, "evaluate", evaluation(), {}),
    }


def evaluation() -> dict[str, Any]:
    """An evaluation's result of the size that such a run has."""
    before, after = parameter_count(SOURCE), parameter_count(TARGET)
    teacher = " is strong, and the people of this country have never been more united in the belief that"
    pruned, distilled = " of the the of <the> & the the war", " is in the hands of the Congress, and I shall"
    return {
        "models": {
            "teacher": _model(before, (19.7, 14.2), None, None, 0.61, 512.3, teacher),
            "pruned": _model(after, (131.4, 288.0), (1.934, 3.012), (0.412, 0.331), 0.53, 671.0, pruned),
            "distilled": _model(after, (24.13, 31.9), (0.312, 0.804), (0.742, 0.601), 0.58, 668.2, distilled),
        },
        "prompt": "My fellow citizens, the state of our Union",
        "tokens": {"in_domain": 24576, "out_of_domain": 24576},
        "task_items": {"piqa_local": 100, "openbookqa_local": 100},
        "sequence_length": 512,
    }  # fmt: skip


def _model(
    parameters: int,
    perplexity: tuple[float, float],
    kl: Any,
    agreement: Any,
    accuracy: float,
    speed: float,
    continuation: str,
) -> dict[str, Any]:
    domains = {
        domain: {
            "perplexity": _figure(perplexity[i], 0.0152 * perplexity[i]),
            "kl": _figure(kl[i], 0.0072) if kl else None,
            "top1_agreement": _figure(agreement[i], 0.0031) if agreement else None,
        }
        for i, domain in enumerate(("in_domain", "out_of_domain"))
    }
    tasks = {
        task: {"acc": _figure(accuracy - shift, 0.0488), "acc_norm": _figure(accuracy - shift + 0.02, 0.0483)}
        for task, shift in (("piqa_local", 0.0), ("openbookqa_local", 0.36))
    }
    return {
        "parameters": parameters,
        "domains": domains,
        "tasks": tasks,
        "tokens_per_second": speed,
        "continuation": continuation,
    }


def _figure(value: float, stderr: float) -> dict[str, float]:
    return {"value": value, "stderr": stderr}


def _scores(random: np.random.Generator) -> dict[str, Any]:
    depth = np.linspace(0, 1, SOURCE.layers)
    influence = 0.07 + 0.16 * (depth - 0.55) ** 2 + 0.01 * random.random(SOURCE.layers)
    influence[0], influence[-1] = 0.62, 0.31
    influence[list(DROPPED)] *= 0.6
    return {
        "ranked_by": {"ffn": {"criterion": "input_of_second", "batch": "l2", "sequence": "mean"}},
        "ffn": [random.lognormal(0, 0.5 + 0.9 * share, SOURCE.ffn).tolist() for share in depth],
        "heads": random.lognormal(0, 0.4, (SOURCE.layers, SOURCE.heads)).tolist(),
        "channels": random.lognormal(0, 0.8, SOURCE.hidden).tolist(),
        "block_influence": influence.tolist(),
    }


def _steps(random: np.random.Generator) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [{"step": 0, "steps": STEPS, "validation": {"forward_kl": 1.87, "perplexity": 128.0}}]
    for step in range(1, STEPS + 1):
        kl = 0.31 + 1.6 * float(np.exp(-step / 22)) + 0.05 * random.standard_normal()
        rate = 3e-4 * min(step / 15, 0.55 + 0.45 * float(np.cos(np.pi * step / STEPS)))
        steps.append({"step": step, "steps": STEPS, "loss": kl, "forward_kl": kl, "cross_entropy": kl + 2.9,
                      "gradient_norm": 0.5 + 3 * float(np.exp(-step / 15)) + 0.1 * random.random(),
                      "learning_rate": rate,
                      "tokens_per_second": 412.0, "memory_gib": 1.9, "seconds": 0.61})  # fmt: skip
        if step % 25 == 0:
            steps[-1]["validation"] = {"forward_kl": kl * 0.98, "perplexity": 19.7 * float(np.exp(0.7 * kl))}
    return steps


def _artifact(folder: Path, stage: str, result: dict[str, Any], files: dict[str, str]) -> Artifact:
    path = folder / stage
    path.mkdir(parents=True)
    for name, text in {**files, "result.json": json.dumps(result)}.items():
        (path / name).write_text(text)
    distributed = stage in ("importance", "distill", "evaluate")
    layout = {"tensor": 1, "pipeline": 2, "data": 1, "sequence": False, "layers_per_stage": "cost", "processes": 2}
    manifest = {
        "stage": stage, "id": stage.encode().hex()[:16], "platform": "cpu",
        "layout": layout if distributed else {"processes": 1},
        "versions": {"python": "3.11.9", "torch": "2.13.0+cpu", "megatron-core": "0.16.1"},
        "seconds": 61.4, "finished": "2026-11-21T04:30:00+00:00",
    }  # fmt: skip
    return Artifact(path, manifest)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    print(run(fake_recipe(), write_run(out / "artifacts"), out))
