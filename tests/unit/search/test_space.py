"""Spaces as the paper gives them, and enumeration against nested loops."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from pydantic import ValidationError

from minitron_megatron.config.search import Space
from minitron_megatron.search.space import cut_sizes, enumerate_space, name_of

from .conftest import LARGE, SMALL

# arXiv 2407.14679, section 4.3
P1_8B = {
    "layers": {"min": 29, "max": 32, "step": 1},
    "heads": [32, 48],
    "ffn_factor": [2.5, 3, 3.5, 4],
    "hidden": [4096, 4608, 5120, 5632, 6144],
}
P1_4B = {**P1_8B, "heads": [24, 32, 48], "hidden": [2560, 3072, 3584, 4096, 4608]}
MINITRON_8B = {"layers": 32, "heads": 48, "ffn": 16384, "hidden": 4096}
MINITRON_4B = {"layers": 32, "heads": 24, "ffn": 9216, "hidden": 3072}


@pytest.mark.parametrize(("space", "size", "published"), [(P1_8B, 4 * 2 * 4 * 5, MINITRON_8B), (P1_4B, 4 * 3 * 4 * 5, MINITRON_4B)])
def test_the_papers_spaces_hold_the_architectures_it_chose(space: dict[str, Any], size: int, published: dict[str, int]) -> None:
    found = enumerate_space(Space.model_validate(space), LARGE)
    assert (len(found.architectures), found.impossible) == (size, 0)
    assert LARGE.resized(**published) in found.architectures


def test_every_combination_that_is_a_model_is_there_once() -> None:
    space = Space(layers=[2, 3, 4], hidden=[16, 24, 32], heads=[2, 3, 4, 8], ffn_factor=[1.0, 1.05, 1.5, 2.0], alignment=4)  # type: ignore[arg-type]
    expected = set()
    for layers, hidden, heads, factor in product((2, 3, 4), (16, 24, 32), (2, 3, 4, 8), (1.0, 1.05, 1.5, 2.0)):
        ffn = 4 * round(factor * hidden / 4 + 1e-9)  # 1.05 × 16 = 16.8 is 16 as well
        if heads % SMALL.kv_groups == 0 and ffn <= SMALL.ffn:
            expected.add((layers, hidden, heads, ffn))
    found = enumerate_space(space, SMALL)
    shapes = [(arch.layers, arch.hidden, arch.heads, arch.ffn) for arch in found.architectures]
    assert len(shapes) == len(set(shapes)) and set(shapes) == expected
    assert found.impossible > 0


def test_a_range_is_the_list_of_its_sizes() -> None:
    assert Space.model_validate({"ffn": {"min": 16, "max": 30, "step": 4}}).ffn == [16, 20, 24, 28]


@pytest.mark.parametrize("axis", [[], [0], [True], {"min": 4, "max": 3, "step": 1}, {"min": 1, "max": 3}, 7, ["a"]])
def test_what_is_no_axis_is_refused_with_its_form(axis: Any) -> None:
    with pytest.raises(ValidationError, match=r"list of whole numbers of 1 or more, or {min"):
        Space.model_validate({"layers": axis})


def test_a_candidate_is_named_and_cut_by_its_sizes() -> None:
    arch = SMALL.resized(layers=3, ffn=40)
    assert name_of(arch) == "L3-D32-H8-G2-F40"
    assert cut_sizes(arch, SMALL) == {"layers": 3, "ffn": 40}
