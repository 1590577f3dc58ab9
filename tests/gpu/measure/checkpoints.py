"""Checkpoints across layer specs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minitron_megatron.checkpoint.sharded import model_state, save_state
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource

from ..houses import House
from ..place import Place, place
from ..setting import Setting


def round_trip(setting: Setting, folder: Path, *, house: str, specs: list[str]) -> dict[str, Any]:
    """Loads the source under the first spec and saves it, loads that under the next, and so on; of each: how many tensors have other bits.

    The source is read and compared by the table of tensors, which knows nothing of specs.
    """
    home, differing = House(Path(house)), {}
    with place(setting) as here:
        before = home.artifacts / "import" / "checkpoint"
        for number, spec in enumerate(specs):
            written = folder / f"{number}_{spec}"
            _rewrite(here, home, before, written, spec)
            differing[f"{number}_{spec}"] = _differing(here, home, written)
            before = written
    return differing


def _rewrite(here: Place, home: House, before: Path, written: Path, spec: str) -> None:
    model = here.model(home, checkpoint=before, spec=spec)
    written.mkdir()
    save_state(model_state(model), written)


def _differing(here: Place, home: House, written: Path) -> int:
    """Tensors that are not the source's, rounded to the precision of the model that was in between."""
    arch = home.architecture()
    original, now = MegatronSource(home.artifacts / "import" / "checkpoint", arch), MegatronSource(written, arch)
    return sum(not torch.equal(original.read(row).to(here.dtype), now.read(row)) for row in tensor_table(arch))
