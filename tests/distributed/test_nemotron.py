"""Nemotron's importance hooks on several processes: outputs of norms with biases, inputs of the matrix behind a squared ReLU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minitron_megatron.config.parallel import Parallel
from minitron_megatron.data.samples import packed_samples

from .conftest import Record
from .house import build_house
from .plain_model import PlainModel, naive_statistics
from .pool import Pool
from .test_importance import FP32, Sums, measure, worst
from .tiny import NEMOTRON, PP2, SEQUENCE, TP2_SP, layout_name

SAMPLES = 20
"""A block of 16 and one of 4."""


@pytest.fixture(scope="module")
def nemotron_house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("nemotron") / "runs"
    build_house(runs, NEMOTRON)
    return runs


@pytest.fixture(scope="module")
def naive(nemotron_house: Path, tmp_path_factory: pytest.TempPathFactory) -> Sums:
    data, cache = nemotron_house / "tiny" / "data" / "train", tmp_path_factory.mktemp("order")
    samples = packed_samples(data, samples=SAMPLES, sequence_length=SEQUENCE, seed=1234, cache=cache, repeat=False)
    tokens = torch.stack([samples[sample][:-1] for sample in range(SAMPLES)])
    return naive_statistics(PlainModel(nemotron_house / "tiny" / "import" / "checkpoint", NEMOTRON), tokens)


@pytest.mark.parametrize("parallel", [TP2_SP, PP2], ids=layout_name)
def test_statistics_of_a_nemotron_equal_a_plain_model_in_fp64(
    pool: Pool, nemotron_house: Path, naive: Sums, tmp_path: Path, measured: Record, parallel: Parallel
) -> None:
    found = measure(pool, nemotron_house, tmp_path / "scores", parallel, samples=SAMPLES)
    assert measured("importance of a nemotron against plain fp64", layout_name(parallel), worst(found, naive)) <= FP32
