"""The command line that all benchmarks of this folder share, and the process that they measure in."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"


def command_line(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes and few runs: whether it runs at all; its figures mean nothing")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results (default: benchmarks/results; with --tiny none is written)")
    return parser


def folder_of(asked: argparse.Namespace) -> Path | None:
    """Where results go."""
    return asked.out or (None if asked.tiny else RESULTS)


def require_engine(device: str) -> None:
    """On CUDA the layers are Transformer Engine's: figures of megatron's own under its name would be others."""
    from minitron_megatron.platform.engine import import_problem

    if device == "cuda" and (why := import_problem()):
        raise SystemExit(f"Transformer Engine: {why}; these figures are of its layers")


@contextmanager
def one_process(device: str) -> Iterator[tuple[Any, Any]]:
    """(world, layout) of one process, with megatron imported behind the platform's hook."""
    from minitron_megatron.platform import activate, retarget

    platform = activate("cuda" if device == "cuda" else "cpu")
    require_engine(device)
    if device == "cpu":
        retarget.install(("modelopt.torch",))
    from minitron_megatron.config.parallel import Parallel
    from minitron_megatron.parallel.layout import global_layout
    from minitron_megatron.parallel.world import distributed_world

    with distributed_world(platform) as world:
        yield world, global_layout(Parallel(), world)
