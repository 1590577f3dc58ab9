"""What step.py measured, as tables: every case, FP8 over bf16, all layers by extrapolation, and where the time goes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from shapes import BF16, shapes
from step_cases import OURS, PEER, STUDENT, TEACHER
from writer import table, write

Case = dict[str, Any]
Key = tuple[str, str, int]
"""Precision, what a micro-batch is, layers."""


def report(cases: Sequence[Case], asked: argparse.Namespace, *, finished: bool = True) -> None:
    whole, figures = shapes(tiny=asked.tiny).teacher.layers, {"cases": list(cases), "extrapolated": extrapolated(cases, asked)}
    body = [
        f"Llama-3.1-8B → 4B by width; {whole} layers are the whole models. Medians, Adam in all; MFU and goals: see the head of "
        "benchmarks/gpu/step.py. `over parts`: over teacher alone + student alone, each with its own output layer (goal ≤ 1.05). "
        "`over bf16`: how many times as fast (goal of FP8 ≥ 1.4).",
        "",
        *table(
            (
                "precision",
                "micro-batch",
                "layers",
                "step",
                "tokens/s",
                "MFU (bf16 peak)",
                "MFU (FP8 peak)",
                "peak GiB",
                "planned",
                "over parts",
                "over bf16",
            ),
            list(rows(cases)),
        ),
        "",
        *without_bf16(cases),
        "Both models alone, and ModelOpt's step of the same layers:",
        "",
        *table(("precision", "micro-batch", "layers", "teacher", "student", "their FP8 over bf16", "ModelOpt", "its peak GiB"), list(parts(cases))),
        "",
        f"All {whole} layers, from what a layer costs between two depths:",
        "",
        *table(("precision", "micro-batch", "step", "tokens/s"), [[x["precision"], *of_numbers(x)] for x in figures["extrapolated"]]),
        *profiles(cases),
        *[f"- {case['precision']} {case.get('side', '')}, {case.get('sequence', '')}: {case['error']}" for case in cases if "error" in case],
    ]
    write("step", "A distillation step on one GPU", body, figures, asked, finished=finished)


def of_numbers(found: Case) -> list[str]:
    return [found["micro_batch"], f"{found['seconds']:.3f} s", f"{found['tokens_per_second']:,.0f}"]


def sides_of(cases: Sequence[Case]) -> dict[Key, dict[str, Case]]:
    found: dict[Key, dict[str, Case]] = {}
    for case in cases:
        if "side" in case:
            found.setdefault((case["precision"], micro_batch_of(case), case["layers"]), {})[case["side"]] = case
    return found


def micro_batch_of(case: Case) -> str:
    """Samples × tokens, and memory of the loss where it is not the default."""
    memory = case.get("loss_memory_mib", 512)
    return f"{case.get('micro_batch', 1)} × {case['sequence']:,}" + (f", loss {memory} MiB" if memory != 512 else "")


def seconds(sides: dict[str, Case] | None, side: str) -> float | None:
    """None where it was not measured or failed."""
    return (sides or {}).get(side, {}).get("seconds")


def mfu(case: Case, peak: str) -> float:
    return case["model_flops"] / case["seconds"] / case["peaks"][peak]


def in_bf16(sides: dict[Key, dict[str, Case]], key: Key) -> dict[str, Case] | None:
    """The same case in bf16, at the same depth."""
    return sides.get((BF16, key[1], key[2]))


def rows(cases: Sequence[Case]) -> Iterator[list[str]]:
    found = sides_of(cases)
    for key, sides in found.items():
        case = sides.get(OURS, {})
        if "seconds" not in case:
            continue
        alone = [seconds(sides, TEACHER), seconds(sides, STUDENT)]
        of_parts = case["seconds"] / sum(filter(None, alone)) if all(alone) else None
        speed = ratio(seconds(in_bf16(found, key), OURS), case["seconds"])
        fp8 = f"{mfu(case, 'fp8'):.1%}" if key[0] != BF16 else "–"
        yield [
            key[0],
            key[1],
            str(key[2]),
            f"{case['seconds']:.3f} s",
            f"{case['tokens'] / case['seconds']:,.0f}",
            f"{mfu(case, 'bf16'):.1%}",
            fp8,
            f"{case['peak_gib']:.1f}",
            f"{case['planned_gib']:.1f}",
            told(of_parts),
            told(speed) if key[0] != BF16 else "–",
        ]


def without_bf16(cases: Sequence[Case]) -> list[str]:
    """Whose speed over bf16 cannot be told, which is a goal: the folder of the results lacks what it would be held against."""
    found = sides_of(cases)
    lacking = [key for key, sides in found.items() if key[0] != BF16 and seconds(sides, OURS) and not seconds(in_bf16(found, key), OURS)]
    lines = [f"- {precision}, {micro_batch}, {layers} layers: no bf16 beside it in this folder" for precision, micro_batch, layers in lacking]
    return [*lines, ""] if lines else []


def parts(cases: Sequence[Case]) -> Iterator[list[str]]:
    found = sides_of(cases)
    for key, sides in found.items():
        alone = {side: seconds(sides, side) for side in (TEACHER, STUDENT, PEER)}
        speeds = [told(ratio(seconds(in_bf16(found, key), side), alone[side])) for side in (TEACHER, STUDENT)]
        shown = [f"{value:.3f} s" if value else "–" for value in alone.values()]
        peak = sides.get(PEER, {}).get("peak_gib")
        over = "–" if key[0] == BF16 else " / ".join(speeds)
        yield [key[0], key[1], str(key[2]), shown[0], shown[1], over, shown[2], f"{peak:.1f}" if peak else "–"]


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def told(value: float | None) -> str:
    return f"{value:.2f}" if value else "–"


def extrapolated(cases: Sequence[Case], asked: argparse.Namespace) -> list[Case]:
    """Whole models of each precision and length that was measured at two depths."""
    whole, found = shapes(tiny=asked.tiny).teacher.layers, sides_of(cases)
    lines: dict[tuple[str, str], dict[int, Case]] = {}
    for (precision, micro_batch, layers), sides in found.items():
        if seconds(sides, OURS):
            lines.setdefault((precision, micro_batch), {})[layers] = sides[OURS]
    result = []
    for (precision, micro_batch), by_depth in lines.items():
        if len(by_depth) < 2:
            continue
        (few, short), *_, (many, long) = sorted(by_depth.items())
        of_layer = (long["seconds"] - short["seconds"]) / (many - few)
        total = long["seconds"] + of_layer * (whole - many)
        speed = long["tokens"] / total
        result.append({"precision": precision, "micro_batch": micro_batch, "seconds": total, "of_layer": of_layer, "tokens_per_second": speed})
    return result


def profiles(cases: Sequence[Case]) -> list[str]:
    """Seconds by kind of kernel, of the deepest step of each."""
    lines: list[str] = []
    for case in cases:
        if "profile" in case:
            total = sum(case["profile"].values())
            lines += ["", f"Where the time goes: {case['side']}, {case['precision']}, {micro_batch_of(case)} tokens, {case['layers']} layers.", ""]
            lines += table(("kind of kernel", "seconds", "share"), [[kind, f"{s:.4f}", f"{s / total:.1%}"] for kind, s in case["profile"].items()])
    return [*lines, ""]
