"""ModelOpt's distillation step, put together as Megatron-LM's post_training does (model_provider, loss_func, training loop).

Both models are one: a stage runs the teacher's layers, then the student's, and sends both activations as one tensor.
"""

from __future__ import annotations

from functools import partial

import modelopt.torch.distill as mtd
import torch
from modelopt.torch.distill.plugins import megatron as mtd_megatron
from step_plain import Trained, trained
from torch import Tensor

from minitron_megatron.config.distill import Distill
from minitron_megatron.data.batches import Batch
from minitron_megatron.model.gpt import StageModel


def peers_step(student: StageModel, teacher: StageModel, settings: Distill) -> Trained:
    """The student converted to a DistillationModel with LogitsKLLoss, temperature 1, without the language model's loss."""
    [chunk], [frozen] = student.chunks, teacher.frozen().chunks
    config = mtd_megatron.setup_distillation_config(mtd_megatron.DistillationConfig(), chunk.config, frozen.config)
    mode = {"teacher_model": frozen, "criterion": config.criterion, "loss_balancer": config.loss_balancer}
    model = mtd.convert(chunk, mode=[("kd_loss", mode)])
    mtd_megatron.adjust_distillation_model_for_mcore(model, config)
    lengths = {"seq_length": settings.sequence_length, "micro_batch_size": settings.micro_batch, "decoder_seq_length": None}
    adjust = mtd_megatron.get_tensor_shapes_adjust_fn_for_distillation(model, **lengths)
    converted = StageModel(student.architecture, student.layout, [model])
    return trained(converted, settings, partial(_loss, model), adjust_tensor_shapes_fn=adjust)


def _loss(model: mtd.DistillationModel, batch: Batch, losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    masked = partial(_masked_sum, batch.loss_mask_BS)
    loss = model.compute_kd_loss(student_loss=masked(losses_BS), loss_reduction_fn=masked)["kd_loss"]
    return loss, batch.loss_mask_BS.sum().int(), {"loss": loss.detach().clone()}


def _masked_sum(mask_BS: Tensor, losses: Tensor | tuple[Tensor, bool, bool]) -> Tensor:
    """Over tokens; on one tensor rank there is nothing to add up."""
    losses_BS = losses[0] if isinstance(losses, tuple) else losses
    return torch.sum(losses_BS.float() * mask_BS)
