"""FP8 weights of Transformer Engine's own classes, built, loaded, published and continued on a CPU; a process of its own.

For CUDA builds of torch and Transformer Engine on a machine without a GPU. What needs a kernel is done by torch on the CPU in its place: rounding to
FP8 (tensorwise), transposing, and writing the main copy into the weights. Prints one JSON object: claim → what was found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from minitron_megatron.platform import Platform, activate

activate("cpu")  # before megatron-core: its optimizer is aimed at the CPU

from megatron.core import tensor_parallel  # noqa: E402
from megatron.core.distributed import param_and_grad_buffer  # noqa: E402
from megatron.core.fp8_utils import is_float8tensor  # noqa: E402

from minitron_megatron.arch.architecture import Architecture  # noqa: E402
from minitron_megatron.checkpoint.sharded import load_model, model_state, save_state  # noqa: E402
from minitron_megatron.config.distill import Distill, Training  # noqa: E402
from minitron_megatron.config.fp8 import ModelFp8  # noqa: E402
from minitron_megatron.config.parallel import Parallel  # noqa: E402
from minitron_megatron.model.build import build_model  # noqa: E402
from minitron_megatron.model.fp8.weights import INITIAL_VALUE, weight_bytes  # noqa: E402
from minitron_megatron.model.gpt import StageModel  # noqa: E402
from minitron_megatron.parallel.layout import Layout, global_layout  # noqa: E402
from minitron_megatron.parallel.world import World, distributed_world  # noqa: E402
from minitron_megatron.training.output_layer import DistillationOutputLayer  # noqa: E402
from minitron_megatron.training.published import published_state  # noqa: E402
from minitron_megatron.training.student import Student, make_student  # noqa: E402
from minitron_megatron.training.training_checkpoint import Progress, TrainingCheckpoints  # noqa: E402

ARCH = Architecture("llama", 5, 64, 8, 2, 16, 96, 131, False, 64, 1e-5, 10000.0)
FP8 = ModelFp8("tensorwise", weights=True)
LARGEST = 448.0
"""Of e4m3."""


def update_quantized(quantizer: Any, source: Tensor, target: Any, **_: Any) -> Any:
    values = source.detach().float()
    scale = LARGEST / values.abs().max().clamp_min(1e-12)
    target._data.copy_((values * scale).to(torch.float8_e4m3fn).view(torch.uint8))
    target._scale_inv.fill_(1 / scale)
    target._transpose, target._transpose_invalid = None, True
    if quantizer.columnwise_usage:
        create_transpose(target)
    return target


def create_transpose(weight: Any) -> None:
    weight._transpose, weight._transpose_invalid = weight._data.t().contiguous(), False


def dequantize(weight: Any, *, dtype: torch.dtype | None = None) -> Tensor:
    return (weight._data.view(torch.float8_e4m3fn).float() * weight._scale_inv).to(dtype or weight.dtype)


def cast_main(weights: Sequence[Any], mains: Sequence[Tensor], *_: Any, **__: Any) -> None:
    for weight, main in zip(weights, mains, strict=True):  # one rank: each main part is whole
        update_quantized(weight._quantizer, main.view(weight.shape), weight)


@contextmanager
def kernels_on_the_cpu() -> Any:
    """A Hopper is told of, and nothing asks it to compute."""
    hopper = {"current_device": lambda: torch.device("cpu"), "get_device_capability": lambda *_: (9, 0), "is_available": lambda: True}
    with mock.patch.multiple(torch.cuda, **hopper, synchronize=lambda *_: None, Stream=mock.MagicMock), ExitStack() as stack:
        from transformer_engine.pytorch import quantization
        from transformer_engine.pytorch.tensor import float8_tensor, utils
        from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

        quantizer = float8_tensor.Float8CurrentScalingQuantizer
        built = quantizer.__init__
        replaced = [
            (quantizer, "__init__", lambda self, *given, **named: built(self, *given, **{**named, "device": torch.device("cpu")})),
            (quantizer, "update_quantized", update_quantized),
            (quantizer, "quantize_impl", lambda self, x: update_quantized(self, x, self.make_empty(x.shape, dtype=x.dtype, device=x.device))),
            (Float8TensorStorage, "_create_transpose", create_transpose),
            (float8_tensor.Float8Tensor, "dequantize", dequantize),
            (utils, "cast_master_weights_to_fp8", cast_main),
            (quantization.FP8GlobalStateManager, "fp8_available", True),
            (tensor_parallel, "model_parallel_cuda_manual_seed", lambda *_, **__: None),
            # gloo makes one type of tensors of several that are gathered together, and loses their bits (torch 2.11 and 2.13); NCCL gathers each
            (param_and_grad_buffer, "_coalescing_manager", lambda *_, **__: nullcontext()),
        ]
        for owner, name, stand_in in replaced:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def rounded(model: StageModel) -> dict[str, Any]:
    return {name: weight for name, weight in model.last.named_parameters() if is_float8tensor(weight)}


def random_source(layout: Layout, platform: Platform, folder: Path) -> dict[str, Tensor]:
    model = build_model(ARCH, layout, platform, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    folder.mkdir()
    save_state(model_state(model), folder)
    return dict(model.last.named_parameters())


def of_teacher(layout: Layout, platform: Platform, folder: Path, source: dict[str, Tensor]) -> dict[str, Any]:
    model = build_model(ARCH, layout, platform, torch.bfloat16, output_layer=None, fp8=FP8)
    load_model(model, folder)
    weights, elements = rounded(model), sum(weight.numel() for weight in rounded(model).values())
    worst = max(
        float((weight.dequantize().float() - source[name].float()).abs().max() / source[name].abs().max()) for name, weight in weights.items()
    )
    copies = [name for name, weight in weights.items() if weight._transpose is not None or hasattr(weight, INITIAL_VALUE)]
    return {"matrices": len(weights), "bytes an element": weight_bytes(weights.values()) / elements, "further copies": copies, "worst": worst}


def of_student(world: World, layout: Layout, folder: Path, source: dict[str, Tensor]) -> dict[str, Any]:
    model = build_model(ARCH, layout, world.platform, torch.bfloat16, output_layer=DistillationOutputLayer, trainable=True, fp8=FP8)
    load_model(model, folder / "source")
    student = make_student(model, Distill(steps=10), Training())
    for part in student.optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
    (folder / "published").mkdir()
    save_state(published_state(student), folder / "published")
    back = build_model(ARCH, layout, world.platform, torch.bfloat16)
    load_model(back, folder / "published")
    published = [name for name, weight in back.last.named_parameters() if not torch.equal(weight, source[name])]
    return {"published otherwise": published, "continued otherwise": continued_otherwise(world, student, folder / "training")}


def continued_otherwise(world: World, student: Student, folder: Path) -> list[str]:
    """FP8 weights whose bytes or scales are others behind a save, a loss of all bytes, and a load."""
    weights = rounded(student.model)
    before = {name: (weight._data.clone(), weight._scale_inv.clone()) for name, weight in weights.items()}
    with TrainingCheckpoints(folder, world, keep=1, asynchronous=False) as checkpoints:
        checkpoints.save(Progress(1, 4), student)
    for weight in weights.values():
        weight._data.zero_()
    with TrainingCheckpoints(folder, world, keep=1, asynchronous=False) as checkpoints:
        checkpoints.load(student)
    return [name for name, weight in weights.items() if not all(map(torch.equal, (weight._data, weight._scale_inv), before[name]))]


def main() -> None:
    platform = Platform("cuda", "gloo", torch.device("cpu"), transformer_engine=True)
    with kernels_on_the_cpu(), distributed_world(platform) as world, TemporaryDirectory() as temporary:
        folder, layout = Path(temporary), global_layout(Parallel(), world)
        source = random_source(layout, platform, folder / "source")
        found = {"teacher": of_teacher(layout, platform, folder / "source", source), "student": of_student(world, layout, folder, source)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
