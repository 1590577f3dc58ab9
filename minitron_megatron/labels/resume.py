"""Texts that are finished, in blocks of consecutive samples; a block's name says which."""

from __future__ import annotations

from pathlib import Path

from minitron_megatron.data.index import is_written


def block_prefix(folder: Path, start: int, stop: int) -> Path:
    """Of samples start … stop − 1."""
    folder.mkdir(exist_ok=True)
    return folder / f"{start:09d}-{stop:09d}"


def finished_blocks(folder: Path, samples: int) -> list[Path]:
    """Those that follow one another from sample 0 on."""
    found = {file.name.partition("-")[0]: file.with_suffix("") for file in sorted(folder.glob("[0-9]*-[0-9]*.idx")) if "weights" not in file.name}
    blocks: list[Path] = []
    done = 0
    while done < samples and f"{done:09d}" in found and is_written(found[f"{done:09d}"]):
        blocks.append(found[f"{done:09d}"])
        done = int(blocks[-1].name.rpartition("-")[2])
    return blocks
