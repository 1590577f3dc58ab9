"""Teachers that a correction publishes beside a distillation: whole or not there, and kept as long as somebody names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_megatron.artifact import Artifact
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import ArtifactError
from minitron_megatron.parallel.world import World
from minitron_megatron.platform import activate
from minitron_megatron.training.snapshots import Snapshots


@pytest.fixture
def world() -> World:
    return World(activate("cpu"))


def recipe(runs: Path, **correct: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "runs": str(runs),
            "model": {"path": "x"},
            "data": {"train": ["x"]},
            "prune": {"target": {}},
            "correct": {"steps": 200, "source_peak": 1e-3, "beside": True, **correct},
            "distill": {"steps": 100},
        }
    )


def snapshots(runs: Path, source: str = "i1", **correct: object) -> Snapshots:
    return Snapshots.of(recipe(runs, **correct), Artifact(runs, {"id": source}), Artifact(runs, {"id": "d1"}))


def publish(found: Snapshots, world: World, *steps: int, keep: int = 2) -> None:
    for step in steps:
        found.publish(step, lambda path, step=step: (path / "weights").write_text(str(step)), world, keep=keep)  # type: ignore[misc]


def test_the_newest_is_by_step_and_the_oldest_go(tmp_path: Path, world: World) -> None:
    found = snapshots(tmp_path)
    assert found.newest() is None
    publish(found, world, 8, 16, 100)
    assert found.newest() == f"{found.correction}-00000100"
    assert sorted(path.name[-3:] for path in found.folder.iterdir()) == ["016", "100"]
    assert (found.checkpoint(f"{found.correction}-00000100") / "weights").read_text() == "100"


def test_what_the_distillation_names_stays_until_it_names_others(tmp_path: Path, world: World) -> None:
    found = snapshots(tmp_path)
    publish(found, world, 8)
    first = found.newest()
    found.mark({str(first)})
    publish(found, world, 16, 24, 32)
    assert found.checkpoint(str(first)).is_dir()
    found.mark({f"{found.correction}-00000032"})
    publish(found, world, 40)
    with pytest.raises(ArtifactError, match="the teacher that this distillation had is not there; put it back"):
        found.checkpoint(str(first))


def test_half_a_snapshot_is_none(tmp_path: Path, world: World) -> None:
    found = snapshots(tmp_path)
    publish(found, world, 8)

    def die(path: Path) -> None:
        (path / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found.publish(16, die, world, keep=2)
    assert found.newest() == f"{found.correction}-00000008"
    publish(found, world, 16)
    assert (found.checkpoint(str(found.newest())) / "weights").read_text() == "16"


def test_a_step_that_is_there_is_not_made_again(tmp_path: Path, world: World) -> None:
    """A correction that continues comes by it once more, while a distillation may be reading it."""
    found = snapshots(tmp_path)
    publish(found, world, 8)
    found.publish(8, lambda path: pytest.fail("written twice"), world, keep=2)


@pytest.mark.parametrize("change", [{"source": "i2"}, {"seed": 7}, {"source_peak": 2e-3}])
def test_another_correction_has_none_of_these(tmp_path: Path, world: World, change: dict[str, object]) -> None:
    publish(snapshots(tmp_path), world, 8)
    assert snapshots(tmp_path, **change).newest() is None  # type: ignore[arg-type]


def test_a_correction_that_is_made_longer_goes_on_with_the_same(tmp_path: Path, world: World) -> None:
    publish(snapshots(tmp_path), world, 8)
    assert snapshots(tmp_path, steps=400, global_batch=8, save_every_steps=3).newest() is not None
