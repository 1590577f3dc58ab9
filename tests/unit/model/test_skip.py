"""A layer that is left out changes nothing of what passes it, and is back afterwards, whatever happens in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.data.batches import Batch
from minitron_megatron.model.build import build_model
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.run import forward_only
from minitron_megatron.model.skip import without_layers
from minitron_megatron.platform import activate

ARCH = Architecture("llama", 3, 24, 4, 2, 6, 40, 31, False, 64, 1e-5, 10000.0)


@pytest.fixture
def model(layout: Any) -> StageModel:
    made = build_model(ARCH, layout, activate("cpu"), torch.float32)
    torch.manual_seed(0)
    for weight in made.parameters():
        weight.data.normal_()
    return made


def final(model: StageModel) -> torch.Tensor:
    tokens = torch.arange(8)[None]
    return forward_only(model, [Batch(tokens, tokens, torch.ones(1, 8), tokens, tokens[:, 0])])[0]


def test_layers_come_back_even_after_an_error(model: StageModel) -> None:
    before, layers = final(model), list(model.layers())
    with pytest.raises(KeyError), without_layers(model, [0, 2]):
        assert not torch.equal(final(model), before)
        raise KeyError
    assert all(now is then for now, then in zip(model.layers(), layers, strict=True))
    assert torch.equal(final(model), before)


def test_without_any_layer_the_final_norm_sees_the_embedding(model: StageModel) -> None:
    with without_layers(model, range(3)):
        found = final(model)[:, 0]
    embedded = model.chunks[0].embedding.word_embeddings.weight[:8]
    expected = embedded / (embedded.square().mean(-1, keepdim=True) + ARCH.norm_eps).sqrt() * model.last.decoder.final_layernorm.weight
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # fp32


def test_a_layer_that_is_not_there_is_named(model: StageModel) -> None:
    with pytest.raises(ValueError, match=r"layers \[3\] are not in a model of 3"), without_layers(model, [1, 3]):
        pass
    assert all(hasattr(layer, "self_attention") for layer in model.layers())
