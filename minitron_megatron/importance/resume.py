"""What an interrupted pass has finished: a scores file of the first samples, by global layer and unit, so that any layout goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from minitron_megatron.errors import ArtifactError
from minitron_megatron.parallel.world import World
from minitron_megatron.scores.statistics import Statistics, measured_keys

FILE = "scores.safetensors"


def save_finished(folder: Path, statistics: Statistics) -> None:
    """On the main process, in place of the segment before; a reader finds the one or the other, never half of it."""
    folder.mkdir(exist_ok=True)
    statistics.save(folder / FILE)


def load_finished(folder: Path, none_yet: Statistics, world: World) -> Statistics:
    """How many samples are finished, on every process, with their sums on the main one; none_yet where no segment was."""
    found = _read(folder / FILE) if world.is_main else None
    samples = world.from_main(found.samples if found else 0)
    if world.is_main and samples:
        print(f"importance: continues behind {samples} finished samples", flush=True)
    return replace(none_yet, samples=samples, sums=found.sums if found else {})


def _read(path: Path) -> Statistics | None:
    try:
        found = Statistics.load(path) if path.is_file() else None
    except ArtifactError:
        return None  # the machine stopped before the disk had it all: measured again
    # of an older version of this program, which saw less: added to, what is new would lack these samples
    return found if found and measured_keys(found.arch, kept=found.origin.get("sums", "all")) <= found.sums.keys() else None
