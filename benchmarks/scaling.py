"""How cost grows: time and memory against tokens, vocabulary, layers, hidden, K, files and candidates, each with a fitted exponent.

Every point is measured in a process of its own. `--only PART` runs one part: loss, step, importance, streams, text, plans; or the curves
whose name has the word. Nothing is written then but the table on the console.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from common import RESULTS, write_result
from growth.curve import WORSE, WORSE_AT_THE_END, Curve, Fit, Point, fastest, fit, fit_memory, is_worse_than_linear

PARTS = {"loss": "model", "step": "model", "importance": "model", "streams": "streams", "text": "text", "plans": "plans"}
"""Part → module; parts of one module are told apart by the curves' names."""
WORKS = {"loss": "KD loss", "step": "distillation step", "importance": "importance pass"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part, or a word of a curve's name")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure_module(asked.measure, asked.only)
        return
    from minitron_megatron.platform import activate

    activate("cpu")  # ahead of megatron, which the curves import
    only = WORKS.get(asked.only, "" if asked.only in PARTS else asked.only)
    modules = [PARTS[asked.only]] if asked.only in PARTS else list(dict.fromkeys(PARTS.values()))
    found = [item for module in modules for item in run(module, only)]
    failed = {name(curve) for module in modules for curve in curves_of(module) if only in name(curve)} - {name(curve) for curve, _ in found}
    if asked.only or failed:
        print("\n".join(table(found)))
        sys.exit(f"failed: {', '.join(sorted(failed))}" if failed else 0)
    from growth.picture import growth_svg

    (RESULTS / "scaling.svg").write_text(growth_svg(found))
    write_result("scaling", "How cost grows", text(found), figures(found))


def run(module: str, only: str) -> list[tuple[Curve, list[Point]]]:
    """The curves of a module, in a fresh process with the environment that the launcher gives to one worker."""
    from minitron_megatron.launcher import worker_environment

    # streams: each large tensor has pages of its own, which a peak then sees come and go
    environment = {**os.environ, **worker_environment(1, streams=True), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--measure", module, "--only", only]
    told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout.splitlines()
    curves = {name(curve): curve for curve in curves_of(module)}
    return [(curves[title], [Point(**point) for point in points]) for title, points in map(json.loads, told)]


def measure_module(module: str, only: str) -> None:
    """Prints a line of JSON for each curve."""
    from minitron_megatron.platform import activate

    activate("cpu")
    from growth.points import measure

    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the console, the lines to whoever asked
    for curve in curves_of(module):
        if only not in name(curve):
            continue
        try:
            points = measure(curve)
            if is_unexplained(curve, points):  # once more: a machine that was slow for a second bends a curve
                points = fastest(points, measure(curve))
        except RuntimeError as error:  # the other curves are worth their minutes all the same
            print(error, flush=True)
            continue
        print(json.dumps([name(curve), [vars(point) for point in points]]), file=lines, flush=True)
        print(*row(curve, points), sep=" | ", flush=True)


def curves_of(module: str) -> list[Curve]:
    curves: list[Curve] = import_module(f"growth.{module}").CURVES
    return curves


def name(curve: Curve) -> str:
    return f"{curve.work} / {curve.quantity}"


def times(points: Sequence[Point]) -> Fit:
    return fit([point.size for point in points], [point.seconds for point in points])


def verdict(curve: Curve, points: Sequence[Point]) -> str:
    return (curve.why or "**not explained**") if is_worse(points) else "no"


def is_worse(points: Sequence[Point]) -> bool:
    """Of time or memory, whichever grows faster."""
    return any(found and is_worse_than_linear(found) for found in (times(points), fit_memory(points)))


def is_unexplained(curve: Curve, points: Sequence[Point]) -> bool:
    return is_worse(points) and not curve.why


def row(curve: Curve, points: Sequence[Point]) -> list[str]:
    time, memory = times(points), fit_memory(points)
    sizes = f"{points[0].size:,}–{points[-1].size:,}"
    cost = f"{points[0].seconds * 1000:,.3g}–{points[-1].seconds * 1000:,.3g} ms"
    peak = f"{points[0].megabytes:,.0f}–{points[-1].megabytes:,.0f} MB"
    return [curve.work, curve.quantity, sizes, cost, exponent(time), peak, exponent(memory) if memory else "—", verdict(curve, points)]


def exponent(found: Fit) -> str:
    return f"{found.exponent:.2f} ± {found.stderr:.2f} ({found.at_the_end:.2f})"


def table(found: Sequence[tuple[Curve, Sequence[Point]]]) -> list[str]:
    header = ["work", "quantity", "from – to", "time", "exponent of time", "peak memory", "exponent of memory", "worse than linear?"]
    rows = [header, [":--", ":--", "--:", "--:", "--:", "--:", "--:", ":--"], *(row(*item) for item in found)]
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def text(found: Sequence[tuple[Curve, Sequence[Point]]]) -> str:
    return "\n".join(
        [
            "![time and memory against each size](scaling.svg)",
            "",
            "cost ≈ c · size^exponent, least squares of the logarithms, ± standard error; in brackets the exponent between the last two points,",
            f"which a constant start does not hide. Worse than linear: above {WORSE} by the fit, or {WORSE_AT_THE_END} at the end. Time is of the",
            "fastest run; a curve that is worse without a known reason is measured twice. Memory is the peak over what was resident before the",
            "first run, not fitted where fewer than four points are above 4 MB.",
            "All other sizes stay as they are: a model that grows in width and depth together costs the product.",
            "",
            *table(found),
        ]
    )


def figures(found: Sequence[tuple[Curve, Sequence[Point]]]) -> dict[str, Any]:
    def of(points: Sequence[Point]) -> dict[str, Any]:
        memory = fit_memory(points)
        return {"time": times(points).to_dict(), "memory": memory.to_dict() if memory else None}

    return {name(curve): of(points) for curve, points in found}


if __name__ == "__main__":
    main()
