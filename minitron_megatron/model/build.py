"""Architecture × Layout × Platform → this process's part of a model, weights zero until they are loaded."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.fp8 import ModelFp8
from minitron_megatron.model.experts import expert_settings
from minitron_megatron.model.fp8.emulation.delayed import move_with_passes
from minitron_megatron.model.fp8.flags import fp8_settings
from minitron_megatron.model.gpt import HiddenStateGPT, OutputLayer, StageModel
from minitron_megatron.model.modules import family_settings
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.split import EndWork, hidden_state_work, layer_works, logits_work, split_layers
from minitron_megatron.platform import Platform
from minitron_megatron.platform.activate import megatron_flags

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    # the FFN holds most of a layer's activations; core attention keeps no scores, so there is little to win in it
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""training.recompute in megatron's words."""


def build_model(
    arch: Architecture,
    layout: Layout,
    platform: Platform,
    dtype: torch.dtype,
    *,
    output_layer: OutputLayer | None = ColumnParallelLinear,
    ends: EndWork | None = None,
    trainable: bool = False,
    variable_lengths: bool = False,
    recompute: str = "none",
    fp8: ModelFp8 | None = None,
    overlap_exchange: bool = False,
    deterministic: bool = False,
) -> StageModel:
    """This process's part of a model, weights zero until they are loaded.

    output_layer: its class; None where only hidden states are wanted. ends: work of the first and last pipeline stage beyond their
    layers, by default that of a forward pass. variable_lengths: micro-batches of one schedule may differ in shape (evaluation of tasks).
    recompute: a key of RECOMPUTE. fp8: how it computes in FP8.
    overlap_exchange: of sequence shards, through the buffers of model/user_buffers.py. deterministic: the same bits each time, on CUDA.
    """
    ends = ends or (logits_work(arch) if output_layer else hidden_state_work(arch))
    config = transformer_config(
        arch,
        layout,
        platform,
        dtype,
        ends=ends,
        variable_lengths=variable_lengths,
        recompute=recompute,
        fp8=fp8,
        overlap_exchange=overlap_exchange,
        deterministic=deterministic,
    )
    # with gradients enabled Transformer Engine would keep a transposed copy of FP8 weights, and megatron their first values in bf16 on the host
    with nullcontext() if trainable else torch.no_grad():
        chunks = [HiddenStateGPT(arch, layout, config, output_layer, stage).to(platform.device) for stage in range(layout.virtual)]
    for chunk in chunks:
        for weight in (chunk.embedding.word_embeddings.weight if chunk.pre_process else None, chunk.output_weight()):
            if weight is not None:
                weight.data.zero_()  # padded rows are loaded from nowhere
        mark_shards(chunk)
        move_with_passes(chunk.decoder, layout.groups.tp_dp_cp)
    model = StageModel(arch, layout, chunks)
    return model if trainable else model.frozen()


def mark_shards(model: nn.Module) -> None:
    """Tells the weights that are shards from those that every tensor rank holds whole.

    megatron marks them only where it also initializes them; without the mark the gradient norm counts tensor rank 0's shards alone.
    """
    dims = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        dim = next((dim for kind, dim in dims.items() if isinstance(module, kind)), None)
        weight = getattr(module, "weight", None)
        if dim is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dim, 1)


@dataclass
class LayerConfig(TransformerConfig):
    """megatron's config with what it has no words for: FFNs of different widths, and FP8 that is emulated.

    megatron's own for widths (heterogeneous_config.py) reads a JSON of Nemotron-NAS's blocks; its transformer block asks only for this method.
    """

    ffn_per_layer: tuple[int, ...] = ()
    emulated_fp8: ModelFp8 | None = None

    def get_config_for_layer(self, layer_number: int) -> TransformerConfig:
        """The config of a layer, counted from 1 over the whole model."""
        config = copy.copy(self)
        if self.ffn_per_layer:
            config.ffn_hidden_size = self.ffn_per_layer[layer_number - 1]
        return config


def transformer_config(
    arch: Architecture,
    layout: Layout,
    platform: Platform,
    dtype: torch.dtype,
    *,
    ends: EndWork,
    variable_lengths: bool = False,
    recompute: str = "none",
    fp8: ModelFp8 | None = None,
    overlap_exchange: bool = False,
    deterministic: bool = False,
) -> LayerConfig:
    """Architecture × Layout → megatron's config; what depends on the machine comes from the platform.

    What the machine lacks for it has been refused by platform/engine_needs.py.
    """
    flags = megatron_flags(platform, arch.family.activation)
    if layout.virtual > 1:
        # batched sends and receives make the gradients of two stages with a virtual pipeline silently wrong; and ranks that wait for each
        # send stand in step with each other pass by pass, which a last stage with the loss in its forward pass makes slow
        flags |= {"batch_p2p_comm": False, "overlap_p2p_comm": True}
    if arch.ffn_per_layer:
        flags |= {"ffn_per_layer": arch.ffn_per_layer, "heterogeneous_block_specs": True}
    return LayerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_groups,
        kv_channels=arch.head_channels,
        ffn_hidden_size=arch.ffn,
        **family_settings(arch.family),
        layernorm_epsilon=arch.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=arch.family.qkv_bias,
        qk_layernorm=arch.family.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        pipeline_model_parallel_layout=_pipeline_layout(arch, layout, ends),
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # a mean per micro-batch would make the loss depend on micro-batch size and data parallelism
        calculate_per_token_loss=True,
        variable_seq_lengths=variable_lengths,
        perform_initialization=False,
        # only this dispatcher allows micro-batches of several shapes; without experts nothing is dispatched
        moe_token_dispatcher_type="alltoall",
        **expert_settings(arch, layout, platform),
        **_recompute(recompute, arch),
        # a CPU gives them anyway, and by faster ways than those that megatron takes then
        deterministic_mode=deterministic and platform.kind == "cuda",
        tp_comm_overlap=overlap_exchange,
        emulated_fp8=fp8 if fp8 and fp8.emulated else None,
        **fp8_settings(fp8),
        **flags,
    )


def _recompute(recompute: str, arch: Architecture) -> dict[str, Any]:
    """megatron names an FFN of experts by another name."""
    arguments = RECOMPUTE[recompute]
    return {**arguments, "recompute_modules": ["moe"]} if arch.experts and "recompute_modules" in arguments else arguments


class StagesOfLayout(PipelineParallelLayerLayout):
    """megatron's list of stages, asked for this process's own stage by default.

    megatron's default is the stage in the *global* groups, which are the student's: a teacher with another pipeline would number its
    layers by the student's stages.
    """

    def __init__(self, stages: list[list[str]], layout: Layout) -> None:
        super().__init__(stages, layout.pipeline)
        self._stage = layout.stage

    def get_layer_offset(self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None) -> int:
        return super().get_layer_offset(layer_type, vp_stage, self._stage if pp_rank is None else pp_rank)

    def get_num_layers_to_build(self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None) -> int:
        return super().get_num_layers_to_build(layer_type, vp_stage, self._stage if pp_rank is None else pp_rank)


def _pipeline_layout(arch: Architecture, layout: Layout, ends: EndWork) -> StagesOfLayout | None:
    if layout.pipeline == 1:
        return None
    stages = layout.pipeline * layout.virtual
    split = split_layers(arch.layers, stages, layout.split_rule, ends, layer_works(arch), ranks=layout.pipeline)
    parts = [["decoder"] * layers for layers in split]
    parts[0].insert(0, "embedding")
    parts[-1].append("loss")
    return StagesOfLayout(parts, layout)
