"""A loss's weight that follows another loss: α of the hidden-state losses beside the logits' loss, and dynamic weights among those."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


class LossBalance:
    """α of L_logits + α·L_hidden: a given number, or L_logits / L_hidden of the previous step (arXiv 2407.14679, section 3).

    It is a tensor on the device and never read by the host: that would hold up every step until the one before is through.
    """

    def __init__(self, weight: float | Literal["dynamic"], device: torch.device | str) -> None:
        self._dynamic = weight == "dynamic"
        self.alpha = torch.tensor(1.0 if weight == "dynamic" else weight, dtype=torch.float32, device=device)
        """[] fp32; replaced, never written into, because backward passes hold it."""
        self.is_set = not self._dynamic
        """False until the first losses are known: a forward-only pass over its global batch measures them ahead of the first step."""

    def update(self, logit_sum: Tensor, hidden_sum: Tensor) -> None:
        """Takes α from a step's losses, each [] and summed over all tokens, pairs and processes, so that α is the same everywhere.

        logit_sum carries its weights of the recipe. Where the ratio is zero or not finite the old α stays: one odd step must not
        end the hidden losses.
        """
        if not self._dynamic:
            return
        ratio = (logit_sum.detach().double() / hidden_sum.detach().double()).float()
        self.alpha = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, self.alpha)
        self.is_set = True

    def state_dict(self) -> dict[str, Tensor]:
        """For the checkpoint: a continued run starts with the α that it would have had."""
        return {"alpha": self.alpha.clone(), "is_set": torch.tensor(self.is_set)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """A fixed weight is the recipe's, whatever the checkpoint says."""
        if self._dynamic:
            self.alpha = state["alpha"].to(self.alpha, copy=True)
            self.is_set = bool(state["is_set"])
