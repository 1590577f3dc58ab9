"""Stage `report`: the artifacts of a run → one HTML page that can be sent to anyone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_megatron.artifact import Artifact
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import ArtifactError
from minitron_megatron.report.page import render_page, summary_sentence
from minitron_megatron.report.run_data import RunData

PAGE = "report.html"


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Writes report.html into the folder. Of the inputs, those that are missing are named on the page."""
    data = read_run(recipe, inputs)
    page = render_page(data)
    (folder / PAGE).write_text(page, encoding="utf-8")
    size = len(page.encode())
    return {"summary": f"{PAGE}, {size / 1e6:.2f} MB", "page": PAGE, "bytes": size, "sentence": summary_sentence(data)}


def read_run(recipe: Recipe, inputs: Mapping[str, Artifact]) -> RunData:
    """The plain data of a run; raises ArtifactError where a file of an artifact cannot be read."""
    return RunData(
        recipe=recipe.model_dump(mode="json"),
        manifests={name: artifact.manifest for name, artifact in inputs.items()},
        plan=_read(inputs.get("prune"), "plan.json"),
        pruned_by=inputs["prune"].result.get("ranked_by") if "prune" in inputs else None,
        importance=_read(inputs.get("importance"), "summary.json"),
        depth=_read(inputs.get("depth"), "depth.json"),
        steps=_read(inputs.get("distill"), "metrics.jsonl") or [],
        evaluation=inputs["evaluate"].result if "evaluate" in inputs else None,
        ranking=_read(inputs.get("search"), "ranking.json"),
    )


def _read(artifact: Artifact | None, name: str) -> Any:
    """A .json file, or the objects of a .jsonl file; None where the artifact or the file is missing."""
    if artifact is None or not (artifact.path / name).is_file():
        return None
    text = (artifact.path / name).read_text(encoding="utf-8")
    try:
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except json.JSONDecodeError as error:
        stage = artifact.path.name
        raise ArtifactError(f"{artifact.path / name}: no valid JSON ({error}); make the stage {stage} anew") from None
