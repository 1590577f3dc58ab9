"""training.overlap_tensor_parallel: what Transformer Engine's buffers cannot do is refused with the mend."""

from __future__ import annotations

import pytest
from shape_8b import WIDTH, Recipes, problems

OVERLAPPED = ["training.overlap_tensor_parallel=true", "parallel.tensor=2", "parallel.sequence=true", "platform=cuda"]


def test_on_cuda_with_sequence_parallelism_it_is_taken_in_bf16_and_in_fp8(recipe_file: Recipes) -> None:
    assert problems(recipe_file(**WIDTH), OVERLAPPED) == []
    assert problems(recipe_file(**WIDTH), [*OVERLAPPED, "fp8.student=tensorwise"]) == []


@pytest.mark.parametrize(
    ("override", "why", "mend"),
    [
        ("platform=cpu", "is Transformer Engine's, on CUDA", "platform=cuda"),
        ("parallel.sequence=false", "overlaps the exchange of sequence shards", "parallel.sequence=true"),
        ("parallel.tensor=1", "overlaps the exchange of sequence shards", "parallel.tensor=2"),
        ("precision=fp32", "its buffers hold bf16 or FP8", "precision=bf16"),
        ("fp8.student=blockwise", "its buffers do not carry blockwise scales", "fp8.student=tensorwise"),
    ],
)
def test_what_its_buffers_cannot_do_is_refused(recipe_file: Recipes, override: str, why: str, mend: str) -> None:
    found = [line for line in problems(recipe_file(**WIDTH), [*OVERLAPPED, override]) if line.startswith("training.overlap_tensor_parallel=true")]
    assert len(found) == 1
    assert why in found[0] and mend in found[0]


def test_mxfp8_is_taken_where_a_rank_has_whole_rows_of_128_tokens(recipe_file: Recipes) -> None:
    """On two tensor ranks: 4096 = 2 × 16 × 128 tokens are, 4160 = 2 × 16.25 × 128 are not; four samples of them are."""
    mxfp8 = [*OVERLAPPED, "fp8.student=mxfp8"]
    assert problems(recipe_file(**WIDTH), [*mxfp8, "distill.sequence_length=4096"]) == []
    [told] = problems(recipe_file(**WIDTH), [*mxfp8, "distill.sequence_length=4160"])
    assert told.startswith("training.overlap_tensor_parallel=true: its buffers hold mxfp8 in 128 tokens of a rank at a time")
    assert told.endswith("distill.micro_batch × sequence_length = 4160 is no multiple of 256; nearest: 4096, 4352")
    assert problems(recipe_file(**WIDTH), [*mxfp8, "distill.sequence_length=4160", "distill.micro_batch=4"]) == []
