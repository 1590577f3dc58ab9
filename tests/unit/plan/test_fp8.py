"""What a plan counts of FP8, to the byte where it can be counted by hand."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.config.distill import Training
from minitron_megatron.config.family import checked_steps, picked_steps
from minitron_megatron.config.fp8 import ModelFp8, Scaling
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.errors import PlatformError
from minitron_megatron.parallel.split import hidden_state_work, logits_work
from minitron_megatron.plan.activations import Pass
from minitron_megatron.plan.buffers import trained_bytes
from minitron_megatron.plan.case import Case
from minitron_megatron.plan.cluster import read_cluster
from minitron_megatron.plan.fp8 import along_columns, along_rows, cast_bytes, is_fp8
from minitron_megatron.plan.layouts import Choice, problems
from minitron_megatron.plan.memory import teacher_weights
from minitron_megatron.plan.split import split_of
from minitron_megatron.plan.stages import stage_plans, trained_stage, training_plan
from minitron_megatron.plan.tables import print_plan
from minitron_megatron.plan.weights import chunk_weights
from minitron_megatron.plan.work import layer_backward, layer_forward

ROOT = Path(__file__).parents[3]
LLAMA_8B = Architecture("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, 131072, 1e-5, 500000.0)
SMALL = Architecture("llama", 3, 64, 4, 2, 16, 128, 131, False, 4096, 1e-5, 10000.0)
MATRICES_8B = 32 * 4096 * (4096 + 6144 + 28672 + 14336)
"""Output of the attention, queries with keys and values, both halves of the gate, and back."""


def small_chunk(fp8: ModelFp8 | None = None) -> tuple[Pass, list[Any]]:
    split = split_of(SMALL, Parallel(), logits_work(SMALL))
    return Pass(split, 1, 32, 2, fp8=fp8), chunk_weights(split, split.chunks(0)[0])


def test_a_teacher_of_8b_in_fp8_takes_six_tenths_of_its_bf16_bytes() -> None:
    run = Pass(split_of(LLAMA_8B, Parallel(), hidden_state_work(LLAMA_8B)), 1, 4096, 2)
    embedding, norms, output = 128256 * 4096 * 2, 65 * 4096 * 2, 128256 * 4096 * 2
    assert teacher_weights(run, 0) == embedding + norms + 2 * MATRICES_8B
    tensorwise = replace(run, fp8=ModelFp8("tensorwise", weights=True))
    assert teacher_weights(tensorwise, 0) == embedding + norms + MATRICES_8B + 32 * 4 * 4  # an fp32 scale for each of four matrices
    assert (teacher_weights(tensorwise, 0) + output) / (teacher_weights(run, 0) + output) < 0.6
    # of 128 × 128 values an fp32 scale: all sides are whole blocks, and their numbers multiples of 4
    assert teacher_weights(replace(run, fp8=ModelFp8("blockwise", weights=True)), 0) == embedding + norms + MATRICES_8B + MATRICES_8B // 128**2 * 4


@pytest.mark.parametrize(
    ("scaling", "rows", "columns"),
    [
        ("tensorwise", 3072 * 9216 + 4, 3072 * 9216),
        ("delayed", 3072 * 9216 + 4, 3072 * 9216),
        ("blockwise", 3072 * 9216 + 24 * 72 * 4, 3072 * 9216 + 72 * 24 * 4),
        ("mxfp8", 3072 * 9216 + 3072 * 288, 3072 * 9216 + 96 * 9216),
        ("nvfp4", 3072 * 9216 // 2 + 3072 * 576 + 4, 3072 * 9216 // 2 + 9216 * 192 + 4),
    ],
)
def test_a_matrix_and_its_scales(scaling: Scaling, rows: int, columns: int) -> None:
    assert (along_rows(scaling, 3072, 9216), along_columns(scaling, 3072, 9216)) == (rows, columns)


def test_scales_of_few_blocks_are_padded() -> None:
    """200 × 300 are 2 × 3 blocks; the inner number is padded to a multiple of 4."""
    assert along_rows("blockwise", 200, 300) == 200 * 300 + 2 * 4 * 4
    assert along_columns("blockwise", 200, 300) == 200 * 300 + 3 * 4 * 4


def test_bf16_weights_are_cast_both_ways_and_fp8_weights_once_more() -> None:
    _, weights = small_chunk()
    matrices = 3 * 64 * (64 + 128 + 256 + 128)
    assert cast_bytes(weights, ModelFp8("tensorwise"), 3) == 2 * matrices + 3 * 4 * 4
    assert cast_bytes(weights, ModelFp8("tensorwise", weights=True), 3) == matrices + 3 * 4 * 4
    ends = ModelFp8("tensorwise", first_last_layers_bf16=True)
    assert cast_bytes(weights, ends, 3) == 2 * matrices // 3 + 4 * 4  # the middle layer alone
    assert cast_bytes(weights, None, 3) == 0


def test_fp8_weights_of_one_rank_are_a_byte_each_and_have_a_main_copy() -> None:
    run, weights = small_chunk()
    training, rest = Training(), sum(weight.elements for weight in weights if weight.sides is None)
    matrices = sum(weight.elements for weight in weights if is_fp8(weight, ModelFp8("delayed"), 3))
    assert rest == 2 * 131 * 64 + 7 * 64 and matrices == 3 * 64 * (64 + 128 + 256 + 128)
    plain = trained_bytes(run.split, [weights], training, stage=0, data_rank=0, width=2)
    eight = trained_bytes(run.split, [weights], training, stage=0, data_rank=0, width=2, fp8=ModelFp8("delayed", weights=True))
    assert plain.weights == 2 * (matrices + rest) and eight.weights == matrices + 2 * rest
    assert eight.optimizer == plain.optimizer == 12 * (matrices + rest) and eight.gradients == plain.gradients


def test_fp8_weights_lie_in_buffers_of_their_own_over_several_ranks() -> None:
    """Two ranks: each buffer ends at a multiple of 128 elements, each weight begins at one of 64."""
    _, weights = small_chunk()
    split = split_of(SMALL, Parallel(data=2), logits_work(SMALL))
    eight = trained_bytes(split, [weights], Training(), stage=0, data_rank=0, width=2, fp8=ModelFp8("delayed", weights=True))
    matrices, rest = 3 * 64 * (64 + 128 + 256 + 128), 2 * 131 * 64 + 7 * 64
    up = -(-rest // 128) * 128
    assert matrices % 128 == 0 and eight.weights == matrices + 2 * up and eight.gradients == 4 * (matrices + up)


def test_products_of_layers_go_to_fp8_and_attention_does_not() -> None:
    bf16, _ = small_chunk()
    run = replace(bf16, fp8=ModelFp8("tensorwise", first_last_layers_bf16=True))
    matrices = 2 * 32 * 64 * (64 + 128 + 256 + 128)  # 2 × tokens × elements
    for work in (layer_forward, layer_backward):
        factor = 1 if work is layer_forward else 2
        assert work(run, 1).fp8_flops == factor * matrices
        assert work(run, 1).flops + work(run, 1).fp8_flops == work(bf16, 1).flops
        assert work(run, 0) == work(bf16, 0) and work(run, 2) == work(bf16, 2)  # first and last layer


def case(*overrides: str, gpu: str = "H200-141GB") -> Case:
    [(step, source, target)] = checked_steps(picked_steps(str(ROOT / "configs" / "llama31_8b_to_4b_width_fp8.yaml"), list(overrides)))
    return Case(step.recipe, source, target, read_cluster(None, gpu=gpu))


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_distillation_in_fp8_is_faster_and_its_teacher_smaller() -> None:
    fp8, bf16 = (trained_stage(item, "distill") for item in (case(), case("fp8=null")))
    assert fp8.step and bf16.step and fp8.memory and bf16.memory
    assert 1.05 < bf16.step.total / fp8.step.total < 2  # no product is more than twice as fast
    assert fp8.memory.parts["teacher's weights"] < 0.6 * bf16.memory.parts["teacher's weights"]
    assert "FP8 casts of weights" not in bf16.memory.parts
    assert fp8.flops == bf16.flops  # of the task


def test_an_emulation_is_counted_as_what_computes_it() -> None:
    emulated, without = (training_plan(item, "distill") for item in (case("fp8.emulated=true"), case("fp8=null")))
    assert emulated == without


def test_a_teacher_in_fp32_is_counted_so() -> None:
    plan = training_plan(case("fp8=null", "teacher_precision=fp32"), "distill")
    assert plan.teachers[0].run.width == 4 and plan.run.width == 2


@pytest.mark.parametrize(
    ("gpu", "overrides", "reason"),
    [
        ("A100-80GB", [], r"fp8.teacher=tensorwise: A100-80GB \(sm_80\) multiplies in no FP8"),
        ("H100-80GB", ["fp8.student=mxfp8", "fp8.weights=false"], r"fp8.student=mxfp8: H100-80GB \(sm_90\) is before Blackwell"),
        ("B200-180GB", ["fp8.student=mxfp8", "fp8.weights=false"], ""),
    ],
)
def test_a_plan_refuses_what_its_gpu_does_not_multiply(gpu: str, overrides: list[str], reason: str) -> None:
    with pytest.raises(PlatformError, match=reason) if reason else nullcontext():
        trained_stage(case(*overrides, gpu=gpu), "distill")


def test_layouts_whose_ranks_would_have_no_whole_multiples_are_left_out_with_the_reason() -> None:
    """9232 / 2 = 4616 = 288.5 × 16."""
    own = case("prune.target.ffn=9232", "prune.align.tensor=1", "parallel.tensor=1", "parallel.sequence=false", "parallel.data=8")
    assert problems(own, Choice(1, 1, 1, 8, 1, "none")) == []
    assert problems(own, Choice(2, 1, 1, 4, 1, "none"))[0].startswith("fp8.student=tensorwise: the pruned model has ffn=9232")


def test_fp8_weights_are_gathered_as_a_byte_each() -> None:
    """Embedding, output layer, norms and both ends stay in bf16: of 4.51 billion weights 3.5 are FP8."""
    bf16, fp8 = training_plan(case("fp8.weights=false"), "distill"), training_plan(case(), "distill")
    matrices = 30 * 3072 * (4096 + 6144 + 2 * 9216 + 9216)  # of 30 layers of 32
    assert bf16.weight_width == 2
    assert fp8.weight_width == pytest.approx(2 - matrices / parameter_count(bf16.split.arch), rel=1e-3)


def test_a_plan_in_fp8_says_so_and_what_of_it_is_guessed() -> None:
    for own, said in ((case(), True), (case("fp8=null"), False)):
        console = Console(width=250, file=StringIO(), record=True)
        print_plan(own, stage_plans(own), console)
        text = " ".join(console.export_text().split())  # titles are folded to their table
        assert ("bf16 and FP8" in text and "55% of the FP8 peak in those of layers: a guess" in text) is said
