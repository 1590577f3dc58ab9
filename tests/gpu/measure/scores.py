"""Importance scores of a house's source model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minitron_megatron.config.importance import Importance
from minitron_megatron.data.samples import evaluation_windows
from minitron_megatron.importance.stage import measure_all
from minitron_megatron.scores.margins import save_scores
from minitron_megatron.scores.statistics import Statistics

from ..houses import House
from ..place import place
from ..setting import Setting


def importance(setting: Setting, folder: Path, *, house: str, samples: int, length: int) -> dict[str, Any]:
    """Leaves scores.safetensors, of held-out windows: every setting sees the same."""
    home = House(Path(house))
    with place(setting) as here:
        arch = home.architecture()
        model = here.model(home, output_layer=None)
        windows = evaluation_windows(home.artifacts / "data" / "heldout", sequence_length=length, tokens=samples * length)
        settings = Importance(samples=len(windows), sequence_length=length, micro_batch=min(4, len(windows)))
        found = measure_all(model, windows, settings, Statistics(arch, 0, {}), folder / "finished", here.world)
        save_scores(found, folder / "scores.safetensors")
    return {"samples": found.samples}
