"""The claims about a GPU, measured on a CPU and small: what measures them works, and a table says so when one does not hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from .bench import Bench, RunFailed
from .claims import GROUPS, Ground
from .runs import carry_out
from .setting import Outcome, Run, Setting
from .verdict import Claim, Verdict, judge, table

LITTLE = {
    "device": "cpu",
    "samples": 4,
    "length": 32,
    "steps": 4,
    "window": 2,
    "resumed_steps": 4,
    "training": ("distill.global_batch=4", "distill.micro_batch=2", "distill.sequence_length=32"),
    "layers": 1,
    "big": "smollm2_135m",
    "loss_size": (64, 32, 515),
    "loss_peak_size": (2048, 64, 8192),
    "loss_peak_mib": 96,
}
ON_CPU_ONLY_AS_BIG = ("memory",)
"""A CPU emulates FP8 in bf16 or fp32: nothing becomes smaller."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), carry_out)


@pytest.fixture(scope="module")
def ground(bench: Bench) -> Ground:
    return Ground(bench.folder, **LITTLE)  # type: ignore[arg-type]


@pytest.mark.parametrize("group", [group for group in GROUPS if group != "smollm2"])
def test_every_group_is_measured_on_a_cpu(group: str, ground: Ground, bench: Bench) -> None:
    verdicts = judge(GROUPS[group](ground), bench)
    assert verdicts and not any(verdict.why for verdict in verdicts), table(verdicts)
    for verdict in verdicts:
        expected = group not in ON_CPU_ONLY_AS_BIG
        assert verdict.holds == expected, table(verdicts)
