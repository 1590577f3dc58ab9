"""A model's logits, loss and gradients.

Legend: S sequence, B samples, D hidden, V vocabulary, N tokens.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minitron_megatron.checkpoint.sharded import model_state, save_state
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource
from minitron_megatron.config.distill import Training, TrainingRun
from minitron_megatron.data.batches import Batch
from minitron_megatron.model.gpt import StageModel
from minitron_megatron.model.logits import real_logits
from minitron_megatron.model.run import forward_backward, forward_only
from minitron_megatron.training.output_layer import DistillationOutputLayer
from minitron_megatron.training.student import make_student
from minitron_megatron.training.teachers import NoTeachers

from ..houses import House
from ..place import place
from ..setting import Setting


def outputs(
    setting: Setting, folder: Path, *, house: str, samples: int, length: int, gradients: bool = False, weights: bool = False
) -> dict[str, Any]:
    """Saves logits [N, V], and gradients of every weight by its name in the table; the loss is the mean cross-entropy in nats."""
    home = House(Path(house))
    with place(setting) as here:
        [batch] = here.text(home, samples=samples, length=length)
        model = here.model(home, output_layer=DistillationOutputLayer, weights=weights)
        tensors = {"logits": _logits(model, batch)}
        figures = {"loss": _cross_entropy(tensors["logits"], batch)}
        if gradients:
            del model
            model = here.model(home, output_layer=DistillationOutputLayer, trainable=True)
            loss, found = _gradients(model, batch, folder / "gradients")
            figures["fused_loss"] = loss
            tensors |= {f"gradient.{name}": gradient for name, gradient in found.items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "tensors.safetensors")
    return figures


def _logits(model: StageModel, batch: Batch) -> Tensor:
    """[N, V] fp32, tokens of a sample beside each other."""
    [hidden_SBD] = forward_only(model, [batch])
    with torch.no_grad():
        return real_logits(model, hidden_SBD.transpose(0, 1).flatten(0, 1)).cpu()


def _cross_entropy(logits_NV: Tensor, batch: Batch) -> float:
    return float(torch.nn.functional.cross_entropy(logits_NV, batch.labels_BS.flatten().cpu()))


def _gradients(model: StageModel, batch: Batch, written: Path) -> tuple[float, dict[str, Tensor]]:
    """Of the mean cross-entropy, through the schedule and the fused loss: brought to the table's names by a checkpoint of them."""
    samples, length = batch.tokens_BS.shape
    settings = TrainingRun(steps=1, sequence_length=length, global_batch=samples, micro_batch=samples)
    student = make_student(model, settings, Training(distributed_optimizer=False))
    for chunk in student.wrapped:
        chunk.zero_grad_buffer()
    [logged] = forward_backward(model, student.wrapped, [batch], partial(student.loss, NoTeachers()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.main_grad)  # type: ignore[attr-defined]
    written.mkdir()
    save_state(model_state(model), written)
    source = MegatronSource(written, model.architecture)
    return float(logged["cross_entropy"] / logged["tokens"]), {row.name: source.read(row) for row in tensor_table(model.architecture)}
