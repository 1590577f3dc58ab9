"""import → prune → export by their stages' own run(), without scores of activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import Artifact, write_json


@dataclass
class Pruned:
    """What the three stages left."""

    imported: Artifact
    pruned: Artifact
    model: Path
    """The exported Hugging Face folder."""

    @property
    def target(self) -> Architecture:
        return Architecture.from_dict(self.pruned.result["architecture"])


@pytest.fixture
def prune_model(tmp_path: Path) -> Callable[..., Pruned]:
    """prune_model(Hugging Face folder, target sizes, **prune settings)."""
    from minitron_megatron.config.schema import Recipe
    from minitron_megatron.convert import export_stage, import_stage
    from minitron_megatron.parallel.world import World
    from minitron_megatron.platform import activate
    from minitron_megatron.prune import stage

    def run(source: Path, sizes: dict[str, int], **prune: Any) -> Pruned:
        recipe = Recipe.model_validate(
            {
                "name": "tiny",
                "model": {"path": str(source)},
                "data": {"train": ["unused"]},
                "prune": {"target": sizes, "scores": "random", **prune},
                "distill": {"steps": 100},
            }
        )

        def finish(name: str, run_stage: Callable[[Path], dict[str, Any]]) -> Artifact:
            folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            write_json(folder / "result.json", run_stage(folder))
            return Artifact(folder, {"id": name})

        imported = finish("import", lambda folder: import_stage.run(recipe, {}, folder))
        pruned = finish("prune", lambda folder: stage.run(recipe, {"import": imported}, folder, World(activate("cpu"))))
        inputs = {"import": imported, "prune": pruned, "distill": pruned}  # a student that was not trained yet
        exported = finish("export", lambda folder: export_stage.run(recipe, inputs, folder))
        return Pruned(imported, pruned, exported.path / "model")

    return run
