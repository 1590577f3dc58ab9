"""The measurements: functions of one process, by the name of their kind.

    python -m gpu.runs RUN_AS_JSON FOLDER

leaves FOLDER/result.json (figures) and perhaps FOLDER/tensors.safetensors, and prints the figures as one line of JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .setting import Run

Measure = Callable[..., dict[str, Any]]
"""(setting, folder, **given) → figures."""


def kinds() -> dict[str, Measure]:
    """Imported here: modules that import megatron.core may not come before the platform is chosen."""
    from .measure import checkpoints, distillation, forward, kd_loss, linear, memory, scores

    return {
        "house": distillation.house,
        "linear": linear.rounded,
        "outputs": forward.outputs,
        "round_trip": checkpoints.round_trip,
        "distill": distillation.distilled,
        "memory": memory.built,
        "scores": scores.importance,
        "loss": kd_loss.against_plain,
        "loss_memory": kd_loss.peak,
    }


def carry_out(run: Run, folder: Path) -> None:
    from minitron_megatron.platform import activate

    activate(run.setting.device)
    figures = kinds()[run.kind](run.setting, folder, **json.loads(run.given))
    partial = folder / "result.json.partial"
    partial.write_text(json.dumps(figures))
    partial.rename(folder / "result.json")  # a run that is cut off while it writes leaves none, and begins anew
    print(json.dumps({"run": run.name, **figures}), flush=True)


if __name__ == "__main__":
    carry_out(Run.from_json(sys.argv[1]), Path(sys.argv[2]))
