"""What megatron is told of FP8 weights, and where weight gradients are added; the weights themselves need a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.distill import Distill, Training
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.platform import activate
from minitron_megatron.training.optimizer import make_optimizer
from minitron_megatron.training.output_layer import DistillationOutputLayer

TINY = Architecture("llama", 1, 16, 2, 1, 8, 16, 32, False, 64, 1e-5, 10000.0)


@pytest.fixture
def model(layout: Any) -> StageModel:
    return build_model(TINY, layout, activate("cpu"), torch.bfloat16, output_layer=DistillationOutputLayer, trainable=True)


def test_fp8_weights_have_the_distributed_optimizer_over_one_rank_too_and_are_gathered_as_such(model: StageModel) -> None:
    """megatron's plain optimizer copies its main parameters over weights as if they were bf16."""
    model.config.fp8_param, model.config.fp8_recipe = True, "tensorwise"
    [wrapped], optimizer = make_optimizer(model.chunks, Distill(steps=10), Training())
    assert wrapped.ddp_config.use_distributed_optimizer and wrapped.ddp_config.fp8_param_gather
    assert optimizer.config.use_distributed_optimizer and optimizer.config.fp8_recipe == "tensorwise"


def test_other_weights_over_one_rank_have_the_plain_optimizer_and_no_word_of_fp8(model: StageModel) -> None:
    """megatron's config names a recipe, delayed, whether a model is FP8 or not."""
    [wrapped], optimizer = make_optimizer(model.chunks, Distill(steps=10), Training())
    assert not wrapped.ddp_config.use_distributed_optimizer and not wrapped.ddp_config.fp8_param_gather
    assert optimizer.config.fp8_recipe is None


def test_transformer_engines_linears_add_their_gradients_to_main_grad_and_megatrons_own_do_not(model: StageModel) -> None:
    """megatron's own would need apex, and say so as they are built."""
    engine = nn.Linear(1, 1, dtype=torch.bfloat16)
    engine.fuse_wgrad_accumulation = False  # type: ignore[assignment]
    model.last.decoder.layers[0].mlp.stand_in = engine
    make_optimizer(model.chunks, Distill(steps=10), Training())
    assert engine.fuse_wgrad_accumulation is True
    assert model.last.output_layer.gradient_accumulation_fusion is False
