"""Which stages a machine without a GPU runs, whatever the recipe's models compute in."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_megatron.chain import STAGES
from minitron_megatron.errors import PlatformError
from minitron_megatron.worker import prepare

ROOT = Path(__file__).parents[3]
RECIPE = "configs/llama31_8b_to_4b_width_fp8.yaml"


@pytest.mark.parametrize("name", ["import", "data", "chat", "teachers", "prune", "export", "report"])
def test_stages_that_build_no_model_run_without_a_gpu_under_a_recipe_in_fp8(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM hides the GPUs from a job that asks for none, as theirs do."""
    monkeypatch.chdir(ROOT)
    recipe, platform = prepare(RECIPE, [], needs_device=STAGES[name].computes)
    assert platform.kind == "cpu" and recipe.fp8 is not None


def test_all_others_are_told_ahead_of_the_first_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    computing = [stage for stage in STAGES.values() if stage.computes]
    assert {"importance", "distill", "search", "evaluate"} < {stage.name for stage in computing}
    for stage in computing:
        with pytest.raises(PlatformError):
            prepare(RECIPE, [], needs_device=stage.computes)
