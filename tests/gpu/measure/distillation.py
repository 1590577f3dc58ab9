"""The stage `distill` as a user starts it, and the house that it starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from minitron_megatron.artifact import partial_folder
from minitron_megatron.checkpoint.regions import TorchDistReader
from minitron_megatron.model.fp8.state import PREFIX

from .. import houses
from ..houses import House
from ..setting import Setting


def house(setting: Setting, folder: Path, *, name: str) -> dict[str, Any]:
    built = houses.build(name, folder, setting)
    return {"architecture": built.architecture().to_dict()}


def distilled(
    setting: Setting, folder: Path, *, house: str, steps: int, overrides: list[str], teacher: str = "none", pauses: list[int] | None = None
) -> dict[str, Any]:
    """Losses of every step and the digest of the last weights.

    setting.fp8: of the student, teacher: of the teacher. pauses: steps after which a start ends, and another process goes on.
    """
    copy = House(Path(house)).with_runs(folder)
    settled = recipe_changes(setting, steps=steps, overrides=overrides, teacher=teacher)
    if setting.fp8:  # what FP8 asks of sizes is part of prune's identity: the same cut under the name that distill looks for
        copy.stage("prune", setting, *settled)
    moved: dict[str, float] = {}
    for pause in pauses or []:
        copy.stage("distill", setting, *settled, f"distill.pause_after_steps={pause}")
        if (made := copy.artifacts / "distill").exists():
            raise RuntimeError(f"{made}: published before step {steps}, though it was to pause after {pause}")
        if setting.fp8 == "delayed":
            moved["scales_moved"] = share_of_moved_scales(copy.artifacts)
    copy.stage("distill", setting, *settled)
    made = copy.artifacts / "distill"
    records = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "loss" in record]
    result = json.loads((made / "result.json").read_text())
    figures = {"losses": [record["loss"] for record in trained], "norms": [record["gradient_norm"] for record in trained]}
    return {**figures, **moved, "steps": [record["step"] for record in trained], "weights": result["weights_sha256"]}


def share_of_moved_scales(artifacts: Path) -> float:
    """Of the newest checkpoint of an unfinished distillation: scales that are no longer 1, as a new one is."""
    training = partial_folder(artifacts, "distill") / "training"
    reader = TorchDistReader(max(training.glob("step_*")))
    scales = torch.cat([reader.read(name).flatten() for name in reader.tensors if name.startswith(PREFIX) and name.endswith(".scale")])
    return float((scales != 1).double().mean())


def recipe_changes(setting: Setting, *, steps: int, overrides: list[str], teacher: str = "none") -> list[str]:
    """Of a house's recipe, as key=value."""
    deterministic = ["training.deterministic=true"] if setting.deterministic else []
    return [f"distill.steps={steps}", "training.asynchronous_checkpoints=false", *_fp8(setting, teacher), *deterministic, *overrides]


def _fp8(setting: Setting, teacher: str) -> list[str]:
    if not setting.fp8 and teacher == "none":
        return []
    emulated = str(setting.device == "cpu").lower()
    return [f"fp8={{student: {setting.fp8 or 'none'}, teacher: {teacher}, emulated: {emulated}}}"]
