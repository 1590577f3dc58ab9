"""The smallest thing that can be FP8: one linear, forward and backward. What fails here fails everywhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..place import relative
from ..setting import Setting

TOKENS, INPUTS, OUTPUTS = 512, 256, 384


def rounded(setting: Setting, folder: Path) -> dict[str, Any]:
    """Relative errors of a bf16 linear's output and gradients against fp64 of the same bf16 values; the second pass, scales known by then."""
    generator = torch.Generator().manual_seed(3)
    x, weight, grad = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((TOKENS, INPUTS), (OUTPUTS, INPUTS), (TOKENS, OUTPUTS)))
    linear, context = _linear(setting), _context(setting)
    with torch.no_grad():
        linear.weight.copy_(weight)
    given = x.to(setting.device).requires_grad_()
    for _ in range(2):
        given.grad = linear.weight.grad = None
        with context():
            found = linear(given)
        found.backward(grad.to(setting.device))
    expected = {"output": x.double() @ weight.double().t(), "input": grad.double() @ weight.double(), "weight": grad.double().t() @ x.double()}
    actual: dict[str, Tensor | None] = {"output": found.detach(), "input": given.grad, "weight": linear.weight.grad}
    return {name: relative(value.detach().cpu(), expected[name]) for name, value in actual.items() if value is not None}


def _linear(setting: Setting) -> nn.Module:
    if setting.spec == "local":
        return nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16, device=setting.device)
    from transformer_engine import pytorch as te

    return te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16, device=setting.device)


def _context(setting: Setting) -> Any:
    """A function that opens the context of a pass."""
    if not setting.fp8 or setting.spec == "local":
        return nullcontext
    from transformer_engine import pytorch as te
    from transformer_engine.common import recipe

    scalings = {"delayed": recipe.DelayedScaling, "tensorwise": recipe.Float8CurrentScaling, "blockwise": recipe.Float8BlockScaling}
    chosen = scalings[setting.fp8]()

    def context() -> AbstractContextManager[None]:
        return te.fp8_autocast(enabled=True, fp8_recipe=chosen)

    return context
