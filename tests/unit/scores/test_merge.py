"""Merged scores files: sums and counts add up, what was measured stays known, and what does not belong together is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.errors import ArtifactError
from minitron_megatron.scores.margins import load_margins, unit_margins
from minitron_megatron.scores.merge import merge, merge_files
from minitron_megatron.scores.statistics import INFLUENCE, Statistics
from minitron_megatron.scores.units import activation_scores

ARCH = Architecture("llama", 2, 6, 8, 2, 4, 10, 131, False, 64, 1e-6, 10000.0)
WIDTHS = {"ffn": ARCH.ffn, "heads": ARCH.heads * ARCH.head_channels, "attention_norm": ARCH.hidden, "mlp_norm": ARCH.hidden}


def scores(first: int, samples: int, *, data: str = "d", seed: int = 1, **origin: Any) -> Statistics:
    generator = torch.Generator().manual_seed(first * 1000 + samples)
    sums = {(layer, axis): torch.rand(3, 2, width, generator=generator, dtype=torch.float64) for layer in range(2) for axis, width in WIDTHS.items()}
    sums |= {(layer, INFLUENCE): torch.rand(2, generator=generator, dtype=torch.float64) for layer in range(2)}
    part = {"data": data, "seed": seed, "first_sample": first, "samples": samples}
    return Statistics(ARCH, samples, sums, {"model": "m" * 64, "sequence_length": 16, "precision": "fp32", "parts": [part], **origin})


def same(a: Statistics, b: Statistics) -> bool:
    alike = (a.arch, a.samples, a.origin) == (b.arch, b.samples, b.origin) and a.sums.keys() == b.sums.keys()
    return alike and all(torch.equal(a.sums[key], b.sums[key]) for key in a.sums)


def test_sums_and_samples_add_up_and_the_parts_are_listed() -> None:
    one, other = scores(0, 32), scores(32, 5)
    merged = merge({"a": one, "b": other})
    assert merged.samples == 37
    assert all(torch.equal(total, one.sums[key] + other.sums[key]) for key, total in merged.sums.items())
    assert merged.origin == {**one.origin, "parts": [*one.origin["parts"], *other.origin["parts"]]}


def test_the_order_of_the_files_changes_no_bit() -> None:
    """Addition of three numbers depends on the order, so the parts are put into that of their samples."""
    a, b, c = scores(0, 32), scores(32, 5), scores(37, 64)
    assert not torch.equal((a.sums[0, "ffn"] + b.sums[0, "ffn"]) + c.sums[0, "ffn"], (c.sums[0, "ffn"] + b.sums[0, "ffn"]) + a.sums[0, "ffn"])
    assert same(merge({"a": a, "b": b, "c": c}), merge({"c": c, "a": a, "b": b}))


def test_merged_files_can_be_merged_on() -> None:
    a, b, c = scores(0, 32), scores(32, 5), scores(37, 64)
    assert same(merge({"ab": merge({"a": a, "b": b}), "c": c}), merge({"a": a, "b": b, "c": c}))


WRONG = {
    "another model": (scores(32, 8, model="n" * 64), "x and y differ in model"),
    "another length": (scores(32, 8, sequence_length=32), r"x and y differ in sequence_length \(16 and 32\)"),
    "another precision": (scores(32, 8, precision="bf16"), r"differ in precision \(fp32 and bf16\)"),
    "another architecture": (replace(scores(32, 8), arch=ARCH.resized(ffn=9)), "differ in architecture"),
    "fewer axes": (replace(scores(32, 8), sums={(0, "ffn"): scores(32, 8).sums[0, "ffn"]}), "differ in axes"),
    "the same samples": (scores(0, 32), "both hold samples 0 to 31 of the same data and seed 1"),
    "some of the same samples": (scores(30, 32), "both hold samples 30 to 31 of the same data and seed 1"),
    "an unfinished pass": (replace(scores(32, 64), samples=16), "y holds 16 of 64 samples, its pass was interrupted"),
    "no parts": (replace(scores(32, 8), origin={"model": "m" * 64}), "y does not say which samples it holds"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_does_not_belong_together_is_refused(kind: str) -> None:
    other, message = WRONG[kind]
    with pytest.raises(ArtifactError, match=message) as raised:
        merge({"x": scores(0, 32), "y": other})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("other", [scores(0, 32, data="e"), scores(0, 32, seed=2), scores(32, 8)], ids=["data", "seed", "range"])
def test_other_data_another_seed_or_the_next_samples_are_taken(other: Statistics) -> None:
    assert merge({"x": scores(0, 32), "y": other}).samples == 32 + other.samples


def test_an_overlap_is_found_in_files_that_were_merged_before() -> None:
    with pytest.raises(ArtifactError, match="z and y both hold samples 40 to 47"):
        merge({"z": merge({"a": scores(0, 32), "b": scores(32, 16)}), "y": scores(40, 32)})


def test_one_file_is_not_enough() -> None:
    with pytest.raises(ArtifactError, match="x: merging takes two scores files or more"):
        merge({"x": scores(0, 32)})


def test_files_and_artifact_folders_become_a_scores_file_with_margins(tmp_path: Path) -> None:
    (tmp_path / "importance").mkdir()
    scores(0, 32).save(tmp_path / "importance" / "scores.safetensors")
    scores(32, 8).save(tmp_path / "b.safetensors")
    merged = merge_files([tmp_path / "importance", tmp_path / "b.safetensors"], tmp_path / "c.safetensors")
    assert same(Statistics.load(tmp_path / "c.safetensors"), merged)
    expected = unit_margins(activation_scores(merged), ARCH.kv_groups)
    stored = load_margins(tmp_path / "c.safetensors")
    assert stored.keys() == expected.keys() and all(torch.equal(stored[name], expected[name]) for name in expected)
