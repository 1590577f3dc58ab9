"""Hidden states → logits, where they are wanted outside a training loss.

Legend: n tokens, v this rank's rows of the vocabulary, D hidden.
"""

from __future__ import annotations

from torch import Tensor

from minitron_megatron.model.gpt import StageModel


def real_logits(model: StageModel, hidden_nD: Tensor) -> Tensor:
    """[n, v] fp32 logits of this rank's real rows of the vocabulary."""
    weight = model.output_weight()
    if weight is None:
        raise RuntimeError("logits are made on the last stage only")
    return (hidden_nD @ weight[: model.valid_rows()].t()).float()
