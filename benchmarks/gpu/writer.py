"""Results of a benchmark on a GPU: gpu_NAME.json and gpu_NAME.md, with date, versions, machine and command."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from options import folder_of

PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "nvidia-modelopt", "liger-kernel")
NO_MEASUREMENT = "**A run of small shapes to see that the benchmark works (--tiny): its figures mean nothing.**"
UNFINISHED = "**The command had not ended: what it had measured until then.**"


def write(name: str, title: str, body: Sequence[str], figures: Any, asked: argparse.Namespace, *, finished: bool = True) -> None:
    """Writes the page and its figures where the command line says so; prints the page, and its figures where they are written nowhere.

    finished=False: what there is so far, without a word and without a look at the GPU, on which another process measures.
    """
    machine, folder = describe(asked.device if finished else ""), folder_of(asked)
    page = [f"# {title}", "", *([] if finished else [UNFINISHED, ""]), *([NO_MEASUREMENT, ""] if asked.tiny else []), *body, "", told(machine)]
    if finished:
        print("\n".join(page))
    if finished and not folder:
        print(json.dumps(figures))
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        put(folder / f"gpu_{name}.md", "\n".join(page) + "\n")
        put(folder / f"gpu_{name}.json", json.dumps({**machine, "tiny": asked.tiny, "figures": figures}, indent=1) + "\n")


def put(path: Path, text: str) -> None:
    """By a rename: a command that is ended while it writes leaves what was there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def told(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    return f"Command: `{machine['command']}`. Date: {machine['date']}. Machine: {machine['machine']}. {versions}."


def describe(device: str) -> dict[str, Any]:
    command = shlex.join(["bash", "benchmarks/gpu/run.sh", Path(sys.argv[0]).stem, *sys.argv[1:]])
    found = {package: number for package in PACKAGES if (number := _version(package))}
    return {"command": command, "date": date.today().isoformat(), "machine": _machine(device), "versions": found}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine(device: str) -> str:
    if not device:
        return "not asked before the end"
    if device == "cuda":
        import torch

        card = torch.cuda.get_device_properties(0)
        return f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    from common import machine

    return machine()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; all columns but the first to the right."""
    return [_line(columns), _line(["---", *["--:"] * (len(columns) - 1)]), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
