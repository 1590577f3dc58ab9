"""HiddenStateGPT: a GPTModel that returns final-normed hidden states, so that logits exist only inside a loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.model.modules import block_spec
from minitron_megatron.parallel.layout import Layout

OutputLayer = type[ColumnParallelLinear]


class HiddenStateGPT(GPTModel):
    """One (virtual) pipeline stage of a GPTModel whose forward ends before the output layer.

    The result is [S, B, D], under sequence parallelism sharded along S; final-normed on the last stage.
    output_layer None: the last stage has no output weight.
    """

    def __init__(self, arch: Architecture, layout: Layout, config: TransformerConfig, output_layer: OutputLayer | None, virtual_stage: int) -> None:
        self.architecture = arch
        self.layout = layout
        self._output_layer_class = output_layer
        super().__init__(
            config,
            block_spec(config, stage_layers(config, virtual_stage)),
            vocab_size=padded_vocab(arch.vocab, layout.tensor),
            max_sequence_length=arch.max_positions,
            pre_process=layout.is_first_stage and virtual_stage == 0,
            post_process=layout.is_last_stage and virtual_stage == layout.virtual - 1,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            rotary_percent=arch.rotary_share,
            rope_scaling=arch.rope_scaling is not None,
            rope_scaling_factor=arch.rope_scaling.factor if arch.rope_scaling else 1.0,
            pg_collection=layout.groups,
            vp_stage=virtual_stage,
        )

    def setup_embeddings_and_output_layer(self) -> None:
        """Puts the output layer's class in place before megatron marks and ties its weight."""
        if self._output_layer_class is None:
            self._drop_output_layer()
            return
        if self.post_process:  # type: ignore[has-type]
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

    def _drop_output_layer(self) -> None:
        """Nothing to save, load or tie: for megatron this is then a stage before the last; the final norm stays, in the decoder."""
        if self.post_process:  # type: ignore[has-type]
            del self.output_layer
        self.post_process = self.share_embeddings_and_output_weights = False

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


@dataclass(frozen=True)
class StageModel:
    """This process's part of a model: a chunk for each of its virtual pipeline stages, in the order of the model's depth."""

    architecture: Architecture
    layout: Layout
    chunks: list[HiddenStateGPT]

    @property
    def config(self) -> TransformerConfig:
        return self.chunks[0].config

    @property
    def last(self) -> HiddenStateGPT:
        """The chunk that holds the output layer, where this is the last stage."""
        return self.chunks[-1]

    def layers_per_stage(self) -> list[int]:
        """Layers of every (virtual) stage of the whole model, in the order of its depth; stage n stands on pipeline rank n mod pipeline."""
        stages = self.config.pipeline_model_parallel_layout
        if stages is None:
            return [self.architecture.layers]
        numbers = range(self.layout.pipeline * self.layout.virtual)
        pipeline = self.layout.pipeline
        return [stages.get_num_layers_to_build(vp_stage=number // pipeline, pp_rank=number % pipeline) for number in numbers]

    def stage_number(self, chunk: int) -> int:
        """Which of these stages a chunk of this process is."""
        return self.layout.stage + chunk * self.layout.pipeline

    def layers(self) -> Iterator[Any]:
        """This process's TransformerLayers; `layer_number` counts over the whole model, from 1."""
        for chunk in self.chunks:
            yield from chunk.decoder.layers

    def parameters(self) -> Iterator[nn.Parameter]:
        for chunk in self.chunks:
            yield from chunk.parameters()

    def output_weight(self) -> Tensor | None:
        return self.last.output_weight()

    def first_row(self) -> int:
        return self.last.first_row()

    def valid_rows(self) -> int:
        return self.last.valid_rows()

    def train(self, mode: bool = True) -> StageModel:
        for chunk in self.chunks:
            chunk.train(mode)
        return self

    def eval(self) -> StageModel:
        return self.train(False)

    def frozen(self) -> StageModel:
        for chunk in self.chunks:
            chunk.requires_grad_(False).eval()
        return self


def padded_vocab(vocab: int, tensor: int) -> int:
    """The vocabulary rounded up so that every tensor rank holds the same number of rows."""
    return -(-vocab // tensor) * tensor


def stage_layers(config: TransformerConfig, virtual_stage: int) -> range:
    """Of this process, counted from 0 over the whole model."""
    stages = config.pipeline_model_parallel_layout
    if stages is None:
        return range(config.num_layers)
    first = stages.get_layer_offset(vp_stage=virtual_stage)
    return range(first, first + stages.get_num_layers_to_build(vp_stage=virtual_stage))
