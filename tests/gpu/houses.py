"""Houses: a run folder with a source model and its text, imported and pruned, that measurements read; one small, one of SmolLM2-135M."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.family import load_recipe
from minitron_megatron.config.schema import Recipe

from .bench import last_words
from .setting import Setting

ROOT = Path(__file__).resolve().parents[2]
SMALL_SEQUENCE = 32
SMALL_SIZES = {
    # every side of every linear is a multiple of 128, which blockwise scaling asks for; SmolLM2's 576 channels are not
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    # 1/√256 or so: larger ones make attention pick one token, and of rounding a difference of whole tokens
    "initializer_range": 0.05,
}
SMALL_TARGET = {"layers": 2, "hidden": 128, "ffn": 256}
SMOLLM2_RECIPE = ROOT / "configs" / "smollm2_135m_to_97m.yaml"
ON_SMOLLM2 = ["parallel.pipeline=1", "importance.samples=32", "data.out_of_domain=[]", "evaluate.tasks=[]"]
SMOLLM2_STAGES = ("import", "data", "importance", "prune")
SMALL_STAGES = ("import", "data", "prune")


@dataclass(frozen=True)
class House:
    """A recipe and what its stages have published."""

    folder: Path

    @property
    def recipe_path(self) -> str:
        return str(self.folder / "recipe.yaml")

    @property
    def overrides(self) -> list[str]:
        return json.loads((self.folder / "overrides.json").read_text())

    def recipe(self) -> Recipe:
        return load_recipe(self.recipe_path, self.overrides)

    @property
    def artifacts(self) -> Path:
        return Path(self.recipe().runs) / self.recipe().name

    def architecture(self, stage: str = "import") -> Architecture:
        result = json.loads((self.artifacts / stage / "result.json").read_text())
        return Architecture.from_dict(result["architecture"])

    def with_runs(self, folder: Path) -> House:
        """The same artifacts under another run folder, hard links where the file system has them: runs do not meet."""
        link = os.link if _links(self.folder, folder) else shutil.copy2
        shutil.copytree(self.artifacts, folder / "runs" / self.recipe().name, copy_function=link, dirs_exist_ok=True)
        shutil.copy(self.recipe_path, folder / "recipe.yaml")
        (folder / "overrides.json").write_text(json.dumps([*self.overrides, f"runs={folder / 'runs'}"]))
        return House(folder)

    def stage(self, name: str, setting: Setting, *overrides: str) -> None:
        """Runs a stage: on CUDA in a process of its own, as a launcher would start it; on CPU here."""
        arguments = [*self.overrides, f"platform={setting.device}", f"precision={setting.precision}", *overrides]
        if setting.device == "cpu":
            from e2e.in_process import in_this_process

            in_this_process(name, self.recipe_path, arguments, 1)
            return
        command = [sys.executable, "-m", "minitron_megatron.worker", name, self.recipe_path, *arguments]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **setting.environment()}
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        sys.stderr.write(done.stderr)
        if done.returncode:
            raise RuntimeError(f"stage {name} ended with {done.returncode}: {last_words(done.stderr)}")


def build(name: str, folder: Path, setting: Setting) -> House:
    """Makes the house `small` or `smollm2`."""
    stages = {"small": _small, "smollm2": _smollm2}[name](folder)
    house = House(folder)
    for stage in stages:
        house.stage(stage, setting)
    return house


def _small(folder: Path) -> tuple[str, ...]:
    """Random weights of a Llama; pruned at random: nothing here is about how good a cut is."""
    import yaml
    from e2e.tiny_model import write_model, write_recipe, write_text

    write_text(folder / "text", files=40)
    write_model(folder / "model", folder / "text", **SMALL_SIZES)
    recipe: dict[str, Any] = yaml.safe_load(write_recipe(folder).read_text())
    recipe["parallel"] = {}
    recipe["prune"] = {"scores": "random", "target": SMALL_TARGET}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "overrides.json").write_text("[]")
    return SMALL_STAGES


def _smollm2(folder: Path) -> tuple[str, ...]:
    """The demo's recipe on one process; its model and speeches lie in .demo, brought by launch/demo_inputs.py or tests/gpu/run_all.sh."""
    shutil.copy(SMOLLM2_RECIPE, folder / "recipe.yaml")
    (folder / "overrides.json").write_text(json.dumps([*ON_SMOLLM2, f"runs={folder / 'runs'}"]))
    return SMOLLM2_STAGES


def _links(source: Path, target: Path) -> bool:
    return source.stat().st_dev == target.stat().st_dev
