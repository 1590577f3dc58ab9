"""Which hidden states are compared: P1's example, rules on other depths, and which stage needs which projection."""

from __future__ import annotations

from typing import Any

import pytest

from minitron_megatron.config.distill import HiddenLoss
from minitron_megatron.distill.hidden.map import Term, hidden_terms, layer_pairs, projection_holders
from minitron_megatron.errors import PlanError


def pairs(teacher: int, student: int, kept: list[int], **settings: Any) -> list[tuple[int, int]]:
    return layer_pairs(HiddenLoss(**settings), teacher, student, kept)


def test_last_minus_2_is_29_to_13_for_32_and_16_layers() -> None:
    assert pairs(32, 16, [*range(15), 31]) == [(29, 13)]  # arXiv 2407.14679, section 3


def test_proportional_pairs_states_that_lie_equally_far_up() -> None:
    assert pairs(32, 16, [], pairs="proportional") == [(2 * layer, layer) for layer in range(1, 16)]
    assert pairs(5, 4, [], pairs="proportional") == [(1, 1), (3, 2), (4, 3)]  # 1.25, 2.5, 3.75
    for teacher in range(2, 12):
        for student in range(2, teacher + 1):
            found = pairs(teacher, student, [], pairs="proportional")
            assert [ours for _, ours in found] == list(range(1, student))
            assert all(abs(theirs - ours * teacher / student) <= 0.5 and theirs < teacher for theirs, ours in found)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [([*range(15), 31], [(31, 15)]), ([0, 1, 4, 5, 7], [(4, 2), (7, 4)]), ([2, 3, 4], [(2, 0)]), ([0, 2, 3], [(2, 1)])],
    ids=["Llama-3.1-Minitron 4B depth", "two blocks", "the first layers dropped", "first kept"],
)
def test_kept_pairs_the_first_kept_layer_after_each_dropped_block(kept: list[int], expected: list[tuple[int, int]]) -> None:
    assert pairs(32, len(kept), kept, pairs="kept") == expected


def test_kept_says_where_it_finds_no_layer_after_a_dropped_one() -> None:
    with pytest.raises(PlanError, match="no kept layer follows a dropped one"):
        pairs(4, 3, [0, 1, 2], pairs="kept")


def test_given_pairs_are_taken_as_they_are() -> None:
    assert pairs(32, 16, [], pairs=[(29, 13), (7, 2)]) == [(29, 13), (7, 2)]


def test_each_comparison_has_the_shared_projection_or_its_own() -> None:
    shared = hidden_terms(HiddenLoss(embeddings=True), [(29, 13), (7, 2)])
    assert shared == [
        Term(("layer", 29), ("layer", 13), "shared"),
        Term(("layer", 7), ("layer", 2), "shared"),
        Term(("embedding",), ("embedding",), "shared"),
    ]
    own = hidden_terms(HiddenLoss(embeddings=True, projection="per_pair"), [(29, 13), (7, 2)])
    assert [term.projection for term in own] == ["pair_29_13", "pair_7_2", "embedding"]


def test_a_projection_stands_on_every_chunk_that_holds_one_of_its_states() -> None:
    chunks = [3, 1, 0, 2]  # layers 0–2, 3, none, 4–5
    shared = hidden_terms(HiddenLoss(embeddings=True), [(9, 4), (8, 2), (7, 3)])
    assert projection_holders(shared, chunks) == {"shared": [0, 1, 3]}
    own = hidden_terms(HiddenLoss(embeddings=True, projection="per_pair"), [(9, 5), (8, 2), (7, 3)])
    assert projection_holders(own, chunks) == {"pair_9_5": [3], "pair_8_2": [0], "pair_7_3": [1], "embedding": [0]}
