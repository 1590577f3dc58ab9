"""Three steps from one file, each in this process: the last distilled model is the source of the next, and one table shows them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from minitron_megatron import conductor
from minitron_megatron.chain import STAGES
from minitron_megatron.config.family import picked_steps
from minitron_megatron.results.family import publish_family

from .in_process import STARTED, in_this_process
from .tiny_model import write_model, write_recipe, write_text

FAMILY = [
    {"name": "large", "prune": {"target": {"ffn": 40}}},
    {"name": "middle", "prune": {"target": {"ffn": 32, "hidden": 24}}},
    {"name": "small", "prune": {"target": {"ffn": 24, "hidden": 24, "layers": 3}}},
]


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(conductor, "launch", in_this_process)
    write_text(tmp_path / "text")
    write_model(tmp_path / "model", tmp_path / "text")
    values = yaml.safe_load(write_recipe(tmp_path).read_text())
    values |= {"parallel": {}, "family": FAMILY, "prune": {"target": {}}}
    values["distill"] |= {"steps": 6, "validate_every_steps": 6, "save_every_steps": 6}
    file = tmp_path / "family.yaml"
    file.write_text(yaml.safe_dump(values))
    STARTED.clear()
    return file


def test_a_family_of_three_steps_in_one_command(family: Path) -> None:
    steps = picked_steps(family)
    assert conductor.run_steps(steps, str(family), []) == 0
    runs = family.parent / "runs" / "tiny"
    sizes = [json.loads((runs / name / "distill" / "result.json").read_text())["architecture"] for name in ("large", "middle", "small")]
    assert [(size["ffn"], size["hidden"], size["layers"]) for size in sizes] == [(40, 32, 4), (32, 24, 4), (24, 24, 3)]
    for before, after in (("large", "middle"), ("middle", "small")):
        trained, taken = (json.loads((runs / where / "result.json").read_text()) for where in (f"{before}/distill", f"{after}/import"))
        assert taken["weights_sha256"] == trained["weights_sha256"]  # to the bit, through the exported folder
    table = publish_family({step.name: json.loads((runs / step.name / "evaluate" / "result.json").read_text()) for step in steps}, runs)
    assert list(table["models"]) == ["original", *(f"{name} {model}" for name in ("large", "middle", "small") for model in ("pruned", "distilled"))]
    assert "small distilled" in (runs / "family.md").read_text()
    first = list(STARTED)
    assert len(first) == 3 * len([stage for stage in STAGES.values() if not stage.asked_by])
    assert conductor.run_steps(steps, str(family), []) == 0
    assert first == STARTED  # everything was up to date
