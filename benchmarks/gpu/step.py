"""A distillation step at the shapes of Llama-3.1-8B → 4B by width: time, MFU and memory in bf16 and in FP8, beside its parts and ModelOpt's step.

All layers where they fit the card with the optimizer, by `minitron plan`'s count; else as many as fit, and half of them: what a layer costs is
their difference, from which all 32 follow. 16,384 tokens a step in micro-batches of one sample. Each precision is a process of its own; what fails
is in the table with its reason. What other commands have measured into the same folder is told with it.

MFU = (teacher forward + 3 × student forward, in multiply-adds counted as two: every matrix that a token meets, output layers included, and
causal attention over half of the sequence) ÷ (seconds × peak). Nothing that is computed again counts. The peak is the data sheet's, dense:
of an H200 989 TFLOP/s in bf16; a second figure sets FP8 runs against the 1,979 of FP8.

    bash benchmarks/gpu/run.sh step                        # all: about 12 minutes
    bash benchmarks/gpu/run.sh step --precisions bf16 --profile        # with ModelOpt's step, about 4 minutes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from options import command_line, folder_of
from shapes import BF16, PRECISIONS
from step_table import report

SEQUENCES = (4096, 8192)
LIMIT_SECONDS = 540


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--sequences", nargs="+", type=int, default=None)
    parser.add_argument("--layers", nargs="+", type=int, default=None, help="depths (default: half of what fits, and what fits)")
    parser.add_argument("--micro-batch", type=int, default=1, help="samples of a micro-batch (docs/performance.md: what to try)")
    parser.add_argument("--loss-memory-mib", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="where the time of the deepest step goes, by kind of kernel")
    parser.add_argument("--no-peer", action="store_true", help="without ModelOpt's step")
    parser.add_argument("--one", choices=PRECISIONS, help="this precision in this process: a line of JSON for each case")
    asked = parser.parse_args()
    asked.sequences = asked.sequences or ([64, 128] if asked.tiny else list(SEQUENCES))
    if asked.one:
        from step_cases import measure_all

        return measure_all(asked)
    report_all((case for name in asked.precisions for case in in_own_process(name)), asked)


def report_all(cases: Iterable[dict[str, Any]], asked: argparse.Namespace) -> None:
    """Writes what there is behind each case: a command that is ended loses none."""
    found: list[dict[str, Any]] = []
    try:
        for case in cases:
            found.append(case)
            print(*(case.get(name, "") for name in ("precision", "sequence", "layers", "side", "seconds", "error")), flush=True)
            report([*earlier(asked, found), *found], asked, finished=False)
    except KeyboardInterrupt:
        found.append({"precision": found[-1]["precision"] if found else asked.precisions[0], "error": "interrupted before it was through"})
    report([*earlier(asked, found), *found], asked)


def earlier(asked: argparse.Namespace, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Other cases that the folder of the results has; a failure of a precision that was measured again is forgotten."""
    folder = folder_of(asked)
    path = folder / "gpu_step.json" if folder else None
    before = json.loads(path.read_text()) if path and path.is_file() else {"figures": {"cases": []}}
    again = {key_of(case) for case in found}
    return [
        case for case in before["figures"]["cases"] if key_of(case) not in again and (case["precision"] not in asked.precisions or "side" in case)
    ]


def key_of(case: dict[str, Any]) -> tuple[Any, ...]:
    """What was measured."""
    return tuple(case.get(name) for name in ("precision", "sequence", "micro_batch", "loss_memory_mib", "layers", "side"))


def in_own_process(name: str) -> Iterator[dict[str, Any]]:
    """Each case as soon as the process has told it; behind them, where it was ended or died, why."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", name, *sys.argv[1:]]
    if name != BF16:
        command.append("--no-peer")  # its distillation exposes no FP8: one precision is enough
    return told_by(name, command)


def told_by(name: str, command: list[str]) -> Iterator[dict[str, Any]]:
    process, began = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), time.monotonic()
    clock = threading.Timer(LIMIT_SECONDS, process.kill)
    clock.start()
    try:
        for line in process.stdout or ():
            if line.startswith("{") and line.endswith("\n"):
                yield json.loads(line)
        code = process.wait()
    finally:  # where this process is interrupted, too
        clock.cancel()
        process.kill()
    late = time.monotonic() - began >= LIMIT_SECONDS
    if code:
        yield {"precision": name, "error": f"not finished within {LIMIT_SECONDS} s" if late else f"its process ended with {code}"}


if __name__ == "__main__":
    main()
