"""One point of a curve in a process of its own, forked from one that has imported everything and computed nothing."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import tempfile
import time
import traceback
from pathlib import Path

from growth.curve import Curve, Point

SECONDS_A_POINT = 0.5
"""Runs are repeated until they have taken so long, at least FEWEST_RUNS and at most MOST_RUNS times; the fastest counts."""
FEWEST_RUNS, MOST_RUNS = 4, 7


def measure(curve: Curve) -> list[Point]:
    """Raises RuntimeError where a size fails."""
    return [_in_a_fork(curve, size) for size in curve.sizes]


def _in_a_fork(curve: Curve, size: int) -> Point:
    folder = Path(tempfile.mkdtemp(prefix="minitron_growth_"))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _tell(curve, size, folder, writer)
    os.close(writer)
    try:
        with os.fdopen(reader) as file:
            told = file.read()
        os.waitpid(child, 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not told:
        raise RuntimeError(f"{curve.work} at {curve.quantity} {size} failed")
    return Point(size, **json.loads(told))


def _tell(curve: Curve, size: int, folder: Path, writer: int) -> None:
    """Ends the process: nothing of the parent's is to be cleaned up here."""
    try:
        figures = _cost(curve, size, folder)
        os.write(writer, json.dumps(figures).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _cost(curve: Curve, size: int, folder: Path) -> dict[str, float]:
    work = curve.prepare(size, folder)
    # a collection of everything that the imports left takes 0.2 s, and comes at one size and not at the next
    gc.collect()
    gc.freeze()
    # what prepare let go of would be taken again without a trace
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _reset_peak()
    began = time.perf_counter()
    work()
    first = time.perf_counter() - began
    megabytes = (_resident("VmHWM") - before) / 1e6
    seconds: list[float] = []
    while len(seconds) < FEWEST_RUNS or (len(seconds) < MOST_RUNS and sum(seconds) < SECONDS_A_POINT):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(first, *seconds), "megabytes": max(megabytes, 0.0)}


def _reset_peak() -> int:
    """Makes the kernel forget the peak so far; bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
