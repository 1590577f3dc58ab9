"""Sizes of a target rounded to multiples, and what rounding changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import gcd, lcm

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.checks.widths import Size, width_limits
from minitron_megatron.config.fp8 import Fp8Multiple
from minitron_megatron.config.prune import Prune


@dataclass
class Rounded:
    """The sizes of prune.target after alignment."""

    sizes: dict[str, Size]
    notes: list[str] = field(default_factory=list)
    """One line for each size that changed: "ffn 9215 → 9216 (multiple of 64)"."""
    fp8: str = ""
    """Why a multiple is larger than prune.align's alone: " for FP8 blockwise under tensor 4"."""
    problems: list[str] = field(default_factory=list)

    def of(self, name: str, source: Architecture) -> int:
        """One number for the whole model."""
        size = self.sizes.get(name, getattr(source, name))
        return size if isinstance(size, int) else max(size)


def rounded_sizes(prune: Prune, source: Architecture, fp8: Fp8Multiple | None = None) -> Rounded:
    """prune.target with its named sizes rounded; a size that equals the source's stays, for nothing is cut there.

    Key/value groups come first, for heads are a multiple of them where heads are aligned at all; hidden comes last, for transformers
    wants a multiple of the heads for some families. fp8: of what the pruned model is then trained in.
    """
    align, found = prune.align, Rounded(prune.target.sizes(), fp8=_reason(prune, fp8))
    of_heads = _heads_of_a_multiple(prune, source, fp8)
    _round(found, "kv_groups", lcm(align.kv_groups, align.tensor), of_heads, [source.kv_groups])
    groups = found.of("kv_groups", source)
    if "kv_groups" in found.sizes:
        found.sizes.setdefault("heads", source.heads_per_group * groups)
    if not found.problems and max(align.heads, align.tensor, of_heads) > 1:
        _round(found, "heads", lcm(align.heads, align.tensor, groups), of_heads, [source.heads_per_group * groups])
    _round(found, "ffn", ffn_multiple(prune), ffn_multiple(prune, fp8), _ffn_limits(prune, source))
    heads = found.of("heads", source) if source.family.hidden_multiple_of_heads else 1
    of_hidden = fp8.multiple if fp8 else 1
    if max(align.hidden, of_hidden) > 1:
        _round(found, "hidden", lcm(align.hidden, heads), of_hidden, [source.hidden])
    return found


def ffn_multiple(prune: Prune, fp8: Fp8Multiple | None = None) -> int:
    return lcm(prune.align.ffn, prune.align.tensor * (fp8.multiple if fp8 else 1))


def _heads_of_a_multiple(prune: Prune, source: Architecture, fp8: Fp8Multiple | None) -> int:
    """How many heads have whole multiples of channels on every tensor rank: then queries, keys, values and their output have them too."""
    if fp8 is None:
        return 1
    channels = fp8.multiple * prune.align.tensor
    return channels // gcd(channels, source.head_channels)


def _reason(prune: Prune, fp8: Fp8Multiple | None) -> str:
    return f" for FP8 {fp8.scaling} under tensor {prune.align.tensor}" if fp8 else ""


def nearest_multiple(size: int, multiple: int, limit: int) -> int | None:
    """The multiple nearest to size, the larger of two as near, at least one multiple and at most limit; None where there is none."""
    best = max((size + multiple // 2) // multiple, 1) * multiple
    if best > limit:
        best = limit // multiple * multiple
    return best or None


def _ffn_limits(prune: Prune, source: Architecture) -> list[int]:
    """For one width that of the narrowest kept layer, for a list each layer's own; a mean may lie anywhere below the widest."""
    ffn, limits = prune.target.ffn, width_limits(prune, source)
    if prune.ffn_by == "global" or (isinstance(ffn, list) and len(ffn) != len(limits)):
        return [source.ffn] * (len(ffn) if isinstance(ffn, list) else 1)
    return limits if isinstance(ffn, list) else [min(limits, default=source.ffn)]


def _round(found: Rounded, name: str, asked: int, of_fp8: int, limits: list[int]) -> None:
    """asked: a multiple, by prune.align and the family; of_fp8: that of FP8, beside it.

    limits: what the source has of it (in its kept groups), for each size; from there on sizes stay, larger ones are refused elsewhere.
    """
    named, multiple = found.sizes.get(name), lcm(asked, of_fp8)
    why = found.fp8 if multiple > asked else ""
    if named is None or multiple == 1:
        return
    wanted = list(zip([named] if isinstance(named, int) else named, limits, strict=True))
    new = [size if size >= limit else nearest_multiple(size, multiple, limit) for size, limit in wanted]
    sizes = [size for size in new if size is not None]
    if len(sizes) < len(new):
        limit = wanted[new.index(None)][1]
        mend = "set prune.align.tensor to less, or fp8.student to another scaling, or to none" if why else f"align {name} to less"
        found.problems.append(f"prune.align: no multiple of {multiple}{why} fits into the source's {name}={limit}; {mend}")
        return
    rounded: Size = sizes[0] if isinstance(named, int) else sizes
    if rounded != named:
        found.notes.append(f"{name} {named} → {rounded} (multiple of {multiple}{why})")
        found.sizes[name] = rounded
