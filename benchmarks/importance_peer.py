"""ModelOpt's importance pass: its hooks on the same model, without the search that follows.

It knows no RMSNorm, and of core attentions only megatron's class and Transformer Engine's: both are told to it here, with the forward
passes that ours has, so that the two differ in nothing but their hooks and the output layer.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor, nn

from minitron_megatron.data.batches import Batch
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.modules import CausalAttention, block_spec


class PeerNorm(nn.RMSNorm):
    """torch's own norm, built as megatron builds norms."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


class PeerAttention(DotProductAttention):
    """Our core attention's forward under the class that the peer converts."""

    forward = CausalAttention.forward


def peer_model(source: StageModel) -> Any:
    """megatron's GPTModel with the weights of ours, as the peer's dynamic model."""
    from modelopt.torch.nas.modules import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry
    from modelopt.torch.prune.plugins import mcore_minitron

    class DynamicNorm(_DynamicLayerNorm):
        def _setup(self, *, num_features: Any) -> None:
            self._register_hparam("num_features", num_features)
            self._register_dynamic_attribute("weight", self._cut_to_active_features)
            self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    if PeerNorm not in DMRegistry:
        DMRegistry.register({PeerNorm: "PeerNorm"})(DynamicNorm)
    model = _plain(source)
    mcore_minitron._convert_model_to_dynamic_space(model, mcore_minitron.get_mcore_minitron_config())
    return model


def _plain(source: StageModel) -> GPTModel:
    [chunk] = source.chunks
    arch, spec = chunk.architecture, block_spec(chunk.config, range(chunk.config.num_layers))
    spec.layer_norm = PeerNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = PeerNorm
        layer.submodules.self_attention.submodules.core_attention = PeerAttention
    model = GPTModel(
        chunk.config,
        spec,
        vocab_size=arch.vocab,
        max_sequence_length=arch.max_positions,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,
        pg_collection=source.layout.groups,
    )
    model.load_state_dict(chunk.state_dict())
    return model.requires_grad_(False).eval()


def with_hooks(model: Any) -> Any:
    """The same model; its hooks add up from now on."""
    from modelopt.torch.prune.plugins.mcore_minitron import ImportanceEstimatorRegistry

    ImportanceEstimatorRegistry(model)
    return model


@torch.no_grad()
def peer_pass(model: Any, batches: list[Batch]) -> None:
    """The forward loop that a user of the peer writes: the model's own forward, which ends in logits."""
    for batch in batches:
        model(batch.tokens_BS, batch.position_ids_BS, None)


def peer_sums(model: Any) -> dict[tuple[int, str], Tensor]:
    """(layer, our name of the axis) → Σ over samples of (mean |x|)², what the peer keeps."""
    sums = {}
    for number, layer in enumerate(model.decoder.layers):
        sums[number, "ffn"], sums[number, "heads"] = layer.mlp._activations, layer.self_attention._activations
        norms = {"attention_norm": layer.input_layernorm, "mlp_norm": layer.pre_mlp_layernorm}
        sums |= {(number, axis): model._activations[id(norm)] for axis, norm in norms.items()}
    return sums
