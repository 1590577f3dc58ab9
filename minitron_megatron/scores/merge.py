"""Scores files of several passes (other data shards, other days) → the file that one pass over all samples would have written.

Every statistic is a sum over samples (P1 section 2.2 takes roots last), so sums and sample counts add up. Parts are added in the
order of their samples whatever the order of the files. One pass adds block after block of 16 samples: the merged sums have its very
bits where every part after the first is one whole block, and differ by fp64 rounding where a part has added several blocks already.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from minitron_megatron.errors import ArtifactError
from minitron_megatron.scores.margins import save_scores
from minitron_megatron.scores.statistics import Statistics

SCORES_FILE = "scores.safetensors"


def merge_files(files: list[Path], output: Path) -> Statistics:
    """Merges scores files, or the importance artifacts that hold them, into a new file.

    Raises ArtifactError, before anything is written, for parts that do not belong together and for an output that exists.
    """
    paths = [file / SCORES_FILE if file.is_dir() else file for file in files]
    repeated = {str(path) for path, count in Counter(paths).items() if count > 1}
    if repeated:
        raise ArtifactError(f"{', '.join(sorted(repeated))} is named twice; name every scores file once")
    merged = merge({str(path): Statistics.load(path) for path in paths})
    if output.exists():
        raise ArtifactError(f"{output} exists; remove it, or name another file with --output")
    if not output.parent.is_dir():
        raise ArtifactError(f"{output.parent}: no such folder; make it, or name another file with --output")
    save_scores(merged, output)
    return merged


def merge(parts: dict[str, Statistics]) -> Statistics:
    """Adds sums and sample counts; origin.parts lists what was measured. parts: name (for messages) → statistics.

    Raises ArtifactError for parts of different models or settings, and for samples that two parts share.
    """
    if len(parts) < 2:
        raise ArtifactError(f"{', '.join(parts) or 'no file'}: merging takes two scores files or more")
    for name, part in parts.items():
        if "parts" not in part.origin:
            raise ArtifactError(f"{name} does not say which samples it holds; make it anew with: minitron importance RECIPE")
        asked = sum(item["samples"] for item in part.origin["parts"])
        if part.samples != asked:
            raise ArtifactError(
                f"{name} holds {part.samples} of {asked} samples, its pass was interrupted; finish it with: minitron importance RECIPE"
            )
    _refuse_strangers(parts)
    _refuse_shared_samples(parts)
    ordered = sorted(parts.values(), key=lambda part: [_order(item) for item in part.origin["parts"]])
    first, *others = ordered
    sums = dict(first.sums)
    for part in others:
        sums = {key: total + part.sums[key] for key, total in sums.items()}
    measured = sorted((item for part in ordered for item in part.origin["parts"]), key=_order)
    return Statistics(first.arch, sum(part.samples for part in ordered), sums, {**first.origin, "parts": measured})


def _refuse_strangers(parts: dict[str, Statistics]) -> None:
    """All against the first: what is equal to it is equal to each other."""
    (name, ours), *others = ((name, _measured_how(part)) for name, part in parts.items())
    for other_name, theirs in others:
        for what, value in ours.items():
            if value != theirs[what]:
                told = f" ({value} and {theirs[what]})" if isinstance(value, (str, int)) else ""
                raise ArtifactError(f"{name} and {other_name} differ in {what}{told}; only scores measured alike can be merged")


def _refuse_shared_samples(parts: dict[str, Statistics]) -> None:
    """In the order of their first samples, where the first two that overlap are neighbours."""
    ordered = sorted(((name, item) for name, part in parts.items() for item in part.origin["parts"]), key=lambda named: _order(named[1]))
    for (name, ours), (other_name, theirs) in pairwise(ordered):
        first, behind = theirs["first_sample"], min(_behind(ours), _behind(theirs))
        if (ours["data"], ours["seed"]) == (theirs["data"], theirs["seed"]) and first < behind:
            raise ArtifactError(
                f"{name} and {other_name} both hold samples {first} to {behind - 1} of the same data and seed {ours['seed']}; "
                "measure other samples with importance.skip_samples, or leave one file out"
            )


def _measured_how(statistics: Statistics) -> dict[str, Any]:
    """What parts of one file have in common."""
    common = {what: statistics.origin[what] for what in ("model", "sequence_length", "precision")}
    common["importance.sums"] = statistics.origin.get("sums", "all")
    axes = {key: value.shape for key, value in statistics.sums.items()}
    return {**common, "architecture": statistics.arch.to_dict(), "axes": axes}


def _order(part: dict[str, Any]) -> tuple[str, int, int]:
    return part["data"], part["seed"], part["first_sample"]


def _behind(part: dict[str, Any]) -> int:
    return part["first_sample"] + part["samples"]
