"""HiddenStateGPT: a GPTModel that returns final-normed hidden states, so that logits exist only inside a loss."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.model.modules import block_spec
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.parallel.split import split_layers
from minitron_megatron.platform import Platform
from minitron_megatron.platform.activate import megatron_flags

OutputLayer = type[ColumnParallelLinear]


class HiddenStateGPT(GPTModel):
    """GPTModel whose forward ends before the output layer: [S, B, D], under sequence parallelism sharded along S."""

    def __init__(self, arch: Architecture, layout: Layout, config: TransformerConfig, output_layer: OutputLayer) -> None:
        self.architecture = arch
        self.layout = layout
        self._output_layer_class = output_layer
        super().__init__(
            config,
            block_spec(config, layers_of_stage(arch, layout)),
            vocab_size=padded_vocab(arch.vocab, layout.tensor),
            max_sequence_length=arch.max_positions,
            pre_process=layout.is_first_stage,
            post_process=layout.is_last_stage,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            rope_scaling=arch.rope_scaling is not None,
            rope_scaling_factor=arch.rope_scaling.factor if arch.rope_scaling else 1.0,
            pg_collection=layout.groups,
        )

    def setup_embeddings_and_output_layer(self) -> None:
        """Puts the output layer's class in place before megatron marks and ties its weight."""
        if self.post_process:
            stock: ColumnParallelLinear = self.output_layer  # type: ignore[has-type]
            self.output_layer = self._output_layer_class(
                self.config.hidden_size,
                self.vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                skip_weight_param_allocation=True,
                tp_group=self.pg_collection.tp,
            )
            self.output_layer.weight = stock.weight
        super().setup_embeddings_and_output_layer()

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    def output_weight(self) -> Tensor | None:
        """[v, D] this rank's rows of the output weight, the embedding's where tied; None on earlier stages."""
        if not self.post_process:
            return None
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight

    def first_row(self) -> int:
        """Token id of this rank's first row of the vocabulary."""
        return self.layout.tensor_rank * (self.vocab_size // self.layout.tensor)

    def valid_rows(self) -> int:
        """How many of this rank's rows of the padded vocabulary are real."""
        rows = self.vocab_size // self.layout.tensor
        return min(max(self.architecture.vocab - self.first_row(), 0), rows)


def build_model(
    arch: Architecture,
    layout: Layout,
    platform: Platform,
    dtype: torch.dtype,
    *,
    output_layer: OutputLayer = ColumnParallelLinear,
    trainable: bool = False,
    variable_lengths: bool = False,
) -> HiddenStateGPT:
    """This process's part of a model, weights zero until they are loaded.

    variable_lengths: micro-batches of one schedule may differ in shape (evaluation of tasks).
    """
    config = transformer_config(arch, layout, platform, dtype, variable_lengths=variable_lengths)
    model = HiddenStateGPT(arch, layout, config, output_layer).to(platform.device)
    for weight in (model.embedding.word_embeddings.weight,) if model.pre_process else ():
        weight.data.zero_()  # padded rows are loaded from nowhere
    if model.output_weight() is not None:
        model.output_weight().data.zero_()
    mark_shards(model)
    return model if trainable else model.requires_grad_(False).eval()


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


def transformer_config(
    arch: Architecture, layout: Layout, platform: Platform, dtype: torch.dtype, *, variable_lengths: bool = False
) -> TransformerConfig:
    """Architecture × Layout → megatron's config; what depends on the machine comes from the platform."""
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_groups,
        kv_channels=arch.head_channels,
        ffn_hidden_size=arch.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.family.qkv_bias,
        qk_layernorm=arch.family.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_model_parallel_layout=_pipeline_layout(arch, layout),
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
        **megatron_flags(platform),
    )


def padded_vocab(vocab: int, tensor: int) -> int:
    """The vocabulary rounded up so that every tensor rank holds the same number of rows."""
    return -(-vocab // tensor) * tensor


def layers_of_stage(arch: Architecture, layout: Layout) -> int:
    return split_layers(arch, layout.pipeline, layout.split_rule)[layout.stage]


def _pipeline_layout(arch: Architecture, layout: Layout) -> list[list[str]] | None:
    if layout.pipeline == 1:
        return None
    stages = [["decoder"] * layers for layers in split_layers(arch, layout.pipeline, layout.split_rule)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages
