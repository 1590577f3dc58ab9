"""A distillation beside its teacher's correction takes up the newest teacher, and none that is older than the one it has."""

from __future__ import annotations

import shutil
from pathlib import Path

from minitron_megatron.artifact import Artifact
from minitron_megatron.distill.teachers import Beside
from minitron_megatron.parallel.world import World
from minitron_megatron.platform import activate
from minitron_megatron.training.snapshots import Snapshots
from minitron_megatron.training.training_checkpoint import Progress


def test_the_teacher_in_memory_stays_where_all_that_was_published_is_gone(tmp_path: Path) -> None:
    """The source, with which a correction begins, would be a step back that nothing tells of."""
    world, snapshots = World(activate("cpu")), Snapshots(tmp_path / "corrected", "c")
    beside = Beside(snapshots, Artifact(tmp_path / "import", {"id": "i1"}), tmp_path / "training", world)
    assert (beside.start(Progress()), beside.identity) == (tmp_path / "import" / "checkpoint", "i1")
    assert beside.newer() is None
    snapshots.publish(8, lambda folder: None, world, keep=2)
    assert (beside.newer(), beside.identity) == (tmp_path / "corrected" / "c-00000008" / "checkpoint", "c-00000008")
    shutil.rmtree(tmp_path / "corrected")
    assert (beside.newer(), beside.identity) == (None, "c-00000008")
