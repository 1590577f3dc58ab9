"""What a step, or a validation, adds up over all tokens and processes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minitron_megatron.errors import TrainingError


@dataclass(frozen=True)
class Sums:
    """[names + terms] fp64, over all tokens and equal on every process: losses and tokens by name, then those of each pair of hidden states."""

    names: tuple[str, ...]
    values: Tensor

    def of(self, name: str) -> Tensor:
        return self.values[self.names.index(name)]

    @property
    def hidden(self) -> Tensor:
        return self.values[len(self.names) :].sum()

    def means(self) -> dict[str, float]:
        """Of each loss over the tokens that count; hidden: of all pairs together, where there are any."""
        values = self.values.tolist()
        by_name = dict(zip(self.names, values, strict=False))
        tokens, inner = by_name.pop("tokens"), values[len(self.names) :]
        if not tokens:
            raise TrainingError("no token counts: the loss masks of all samples are zero; look at the data, or make distill.global_batch larger")
        return {name: value / tokens for name, value in by_name.items()} | ({"hidden": sum(inner) / tokens} if inner else {})


@dataclass(frozen=True)
class WindowSums:
    """[W, names] fp64: losses and tokens of each held-out window, equal on every process."""

    names: tuple[str, ...]
    values: Tensor

    def total(self) -> Sums:
        return Sums(self.names, self.values.sum(0))

    def means(self) -> dict[str, list[float | None]]:
        """Of each loss over the tokens of each window; None where no token of a window counts."""
        columns = dict(zip(self.names, self.values.T.tolist(), strict=True))
        tokens = columns.pop("tokens")
        return {name: [value / count if count else None for value, count in zip(values, tokens, strict=True)] for name, values in columns.items()}
