"""Teachers that a correction publishes while it goes on, for a distillation beside it: runs/NAME/corrected/ID/.

A snapshot is a folder with manifest.json and checkpoint/, whole as soon as it has its name. Its id is the correction's and the step's.
The correction keeps the newest ones, and those that carry the distillation's mark.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from minitron_megatron.artifact import FORMAT, Artifact, artifact_id, write_json
from minitron_megatron.config.schema import Recipe
from minitron_megatron.errors import ArtifactError
from minitron_megatron.parallel.world import World

MARK = "in_use"


@dataclass(frozen=True)
class Snapshots:
    """Of one correction: another recipe's, or another model's, are none of its own."""

    folder: Path
    correction: str

    @staticmethod
    def of(recipe: Recipe, source: Artifact, data: Artifact) -> Snapshots:
        """The same for the job that corrects and the one that distils, whatever may change between two starts of the correction."""
        if recipe.correct is None:
            raise RuntimeError("snapshots are a correction's")
        settings = {"correct": recipe.correct.lasting(), "precision": recipe.precision}
        settings |= {"student_fp8": recipe.student_fp8.shaping()} if recipe.student_fp8 else {}
        identity = artifact_id("correct", settings, {"import": source.id, "data": data.id}, [])
        return Snapshots(Path(recipe.runs) / recipe.name / "corrected", identity)

    def publish(self, step: int, write: Callable[[Path], None], world: World, *, keep: int) -> None:
        """Makes one of what write puts into a folder; every process calls this. A step that is there already is left as it is."""
        identity = f"{self.correction}-{step:08d}"
        if world.from_main((self.folder / identity).exists()):
            return
        unfinished = self.folder / f".writing-{identity}"
        if world.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
            (unfinished / "checkpoint").mkdir(parents=True)
        world.barrier()
        write(unfinished / "checkpoint")
        world.barrier()
        if world.is_main:
            write_json(unfinished / "manifest.json", {"stage": "correct", "id": identity, "format": FORMAT, "step": step})
            unfinished.rename(self.folder / identity)
            self._drop(keep)
        world.barrier()

    def newest(self) -> str | None:
        """Id of the newest published one."""
        return max(self._own(), default=None)

    def checkpoint(self, identity: str) -> Path:
        """Raises ArtifactError for one that is not there any more."""
        if not (self.folder / identity / "manifest.json").is_file():
            raise ArtifactError(
                f"{self.folder / identity}: the teacher that this distillation had is not there; put it back, or remove the unfinished "
                "distillation's folder to start it anew with the newest one"
            )
        return self.folder / identity / "checkpoint"

    def mark(self, used: Iterable[str]) -> None:
        """The distillation's word on what must stay; on one process."""
        wanted = set(used)
        for snapshot in self.folder.glob("[!.]*"):
            if snapshot.name in wanted:
                (snapshot / MARK).touch()
            else:
                (snapshot / MARK).unlink(missing_ok=True)

    def _own(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob(f"{self.correction}-*"))

    def _drop(self, keep: int) -> None:
        """The distillation takes up only the newest, so one that is about to be marked is never among those that go."""
        newest = self._own()[-keep:]
        for folder in self.folder.iterdir():
            if folder.name not in newest and not (folder / MARK).exists():
                going = folder.rename(folder.with_name(f".dropped-{folder.name}")) if not folder.name.startswith(".") else folder
                shutil.rmtree(going, ignore_errors=True)
