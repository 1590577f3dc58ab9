"""Data-parallel wrapper and optimizer of a model in training, with or without a state that is shared out over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron_megatron.config.distill import Training, TrainingRun
from minitron_megatron.model.fp8.weights import are_rounded, complete_copies
from minitron_megatron.model.gpt import HiddenStateGPT


def make_optimizer(
    chunks: Sequence[HiddenStateGPT], settings: TrainingRun, training: Training, *, finalize: Callable[..., None] = finalize_model_grads
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """Wraps the chunks of this process's stage; parameters of bf16 models have an fp32 main copy, gradients are fp32.

    Over one data-parallel rank there is nothing to share out and nothing to overlap: such a model has the plain optimizer, but where
    its weights are FP8, which only the distributed optimizer can write. With torch's Adam in the place of Transformer Engine's and apex's the
    distributed one's state could be saved but not loaded: platform/engine_needs.py refuses that.
    """
    config = chunks[0].config
    several_ranks = chunks[0].layout.groups.dp_cp.size() > 1
    ddp = (
        _ddp_config(training, config, len(chunks))
        if several_ranks or are_rounded(config)
        else DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    )
    wrapped = [
        # buckets of later chunks are not on the critical path (as in Megatron-LM)
        DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=number > 0, pg_collection=chunk.layout.groups)
        for number, chunk in enumerate(chunks)
    ]
    _count_padding(wrapped)
    _fuse_weight_gradients(chunks)
    optimizer = get_megatron_optimizer(_optimizer_config(settings, config, ddp), wrapped)
    for chunk in chunks:
        _connect(chunk.config, wrapped, optimizer, finalize)
    return wrapped, optimizer


@contextmanager
def whole_parameters(wrapped: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside, every parameter is whole and nothing is under way: with overlap_param_gather the last step's are still coming in."""
    with ExitStack() as stack:
        for chunk in wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.disable_forward_pre_hook(param_sync=True)
                complete_copies(chunk.parameters())
                stack.callback(chunk.enable_forward_pre_hook)
        yield


def write_main_into_weights(optimizer: MegatronOptimizer, wrapped: Sequence[DistributedDataParallel]) -> None:
    """FP8 weights rounded anew from the fp32 main copy and gathered, as a step does it: what a checkpoint holds of them is rounded twice."""
    if not are_rounded(wrapped[0].module.config):
        return
    with torch.no_grad():
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            part._copy_main_params_to_model_params()
        for chunk in wrapped:
            chunk.start_param_sync(force_sync=True)
            complete_copies(chunk.parameters())


def _fuse_weight_gradients(chunks: Sequence[HiddenStateGPT]) -> None:
    """Transformer Engine's linears add their weight gradients to main_grad in the product's own kernel, with or without apex.

    Set here, where main_grad has come to be, and not in megatron's config: with that its own linears, such as the output layer, raise without apex.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True


def _ddp_config(training: Training, config: TransformerConfig, chunks: int) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=training.distributed_optimizer,
        overlap_grad_reduce=training.overlap_grad_reduce,
        overlap_param_gather=training.overlap_param_gather,
        align_param_gather=training.overlap_param_gather and chunks > 1,
        fp8_param_gather=config.fp8_param,
    )


def _count_padding(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Lets buckets call their padding their own.

    megatron's checkpoints join the buckets of a buffer without the padding behind each, but look for a weight's state at its place in the buffer,
    padding counted (`fully_reshardable` in distrib_optimizer.py, 0.16.1 and 0.19.2): behind the first padding all would be saved shifted.
    """
    for chunk in wrapped:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def _connect(config: Any, wrapped: list[DistributedDataParallel], optimizer: MegatronOptimizer, finalize: Callable[..., None]) -> None:
    """What the schedules call, as Megatron-LM's training loop sets it."""
    ddp = wrapped[0].ddp_config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize
    if ddp.overlap_grad_reduce:  # gradients are reduced once, after the last micro-batch
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
        config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])
    if ddp.align_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in wrapped])


def _one_or_all(functions: list[Callable[..., Any]]) -> Any:
    return functions[0] if len(functions) == 1 else functions


def _optimizer_config(settings: TrainingRun, config: TransformerConfig, ddp: DistributedDataParallelConfig) -> OptimizerConfig:
    adam, bf16 = settings.adam, config.params_dtype == torch.bfloat16
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate.peak,
        min_lr=settings.learning_rate.minimum,
        weight_decay=adam.weight_decay,
        adam_beta1=adam.beta1,
        adam_beta2=adam.beta2,
        adam_eps=adam.eps,
        clip_grad=settings.clip_gradient_norm,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=ddp.use_distributed_optimizer,
        overlap_param_gather=ddp.overlap_param_gather,
        # how it writes FP8 weights; of a model whose weights are not, it asks for nothing
        fp8_recipe=config.fp8_recipe if config.fp8_param else None,
    )
