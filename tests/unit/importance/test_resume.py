"""What an interrupted pass left is taken up only where it holds everything that this version measures."""

from __future__ import annotations

from pathlib import Path

import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.importance.resume import load_finished, save_finished
from minitron_megatron.parallel.world import World
from minitron_megatron.platform import activate
from minitron_megatron.scores.statistics import Statistics, measured_keys

ARCH = Architecture("llama", 2, 6, 8, 2, 4, 10, 131, False, 64, 1e-6, 10000.0)


def test_a_finished_part_that_lacks_an_axis_is_measured_again(tmp_path: Path) -> None:
    """Added to, the new axis would hold the later samples alone and count as all of them."""
    world, none_yet = World(activate("cpu")), Statistics(ARCH, 0, {})
    whole = {key: torch.ones(3, 2, 4, dtype=torch.float64) for key in measured_keys(ARCH)}
    save_finished(tmp_path, Statistics(ARCH, 16, whole))
    assert load_finished(tmp_path, none_yet, world).samples == 16
    save_finished(tmp_path, Statistics(ARCH, 16, {key: value for key, value in whole.items() if key[1] != "head_norms"}))
    found = load_finished(tmp_path, none_yet, world)
    assert (found.samples, found.sums) == (0, {})
