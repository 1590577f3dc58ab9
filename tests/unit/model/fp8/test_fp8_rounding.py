"""The emulation's rounding against tables of all 8-bit numbers, built here from their bits, and the scaling rules in plain arithmetic."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from minitron_megatron.platform import activate

activate("cpu")

from minitron_megatron.config.fp8 import Fp8, ModelFp8  # noqa: E402
from minitron_megatron.errors import RecipeError  # noqa: E402
from minitron_megatron.model.fp8.emulation.delayed import AmaxHistory, DelayedScaling, move_together  # noqa: E402
from minitron_megatron.model.fp8.emulation.linear import Ranks, RoundedProduct, linear_scaling  # noqa: E402
from minitron_megatron.model.fp8.emulation.rounding import E4M3, E5M2, amax_of, block_rounded, mx_scale_of, rounded, scale_of  # noqa: E402
from minitron_megatron.model.fp8.emulation.scaling import Types  # noqa: E402

ONE_RANK = Ranks(None, shares_sequence=False, sums_gradient=False)


class Numbers(NamedTuple):
    """An 8-bit type: all its numbers from 0 up, in the order of their codes."""

    dtype: torch.dtype
    values: list[float]

    def nearest(self, x: float) -> float:
        """Ties go to the even code; beyond the last number to that."""
        if math.isnan(x):
            return x
        magnitude = min(abs(x), self.values[-1])
        above = bisect.bisect_left(self.values, magnitude)
        code = min(range(max(above - 1, 0), above + 1), key=lambda number: (abs(self.values[number] - magnitude), number % 2))
        return math.copysign(self.values[code], x)


def numbers(dtype: torch.dtype, exponent_bits: int, mantissa_bits: int, largest: float) -> Numbers:
    """OCP 8-bit formats (arXiv 2209.05433, table 1): subnormal where the exponent's bits are 0."""
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    found = [step / steps * 2.0 ** (1 - bias) for step in range(steps)]
    found += [(1 + step / steps) * 2.0 ** (exponent - bias) for exponent in range(1, 2**exponent_bits) for step in range(steps)]
    return Numbers(dtype, [value for value in found if value <= largest])


TYPES = {"e4m3": numbers(E4M3, 4, 3, 448.0), "e5m2": numbers(E5M2, 5, 2, 57344.0)}


def plain_scale(amax: float, largest: float) -> np.float32:
    return np.float32(1) if amax == 0 or math.isinf(amax) else np.float32(largest) / np.float32(amax)


def power_below(x: float) -> float:
    return 2.0 ** math.floor(math.log2(x))


def plain_rounded(x: np.ndarray, kind: Numbers, scale: float) -> np.ndarray:
    inverse = np.float32(1) / np.float32(scale)
    return np.array([np.float32(kind.nearest(float(np.float32(value) * np.float32(scale)))) * inverse for value in x.flat]).reshape(x.shape)


def plain_blocks(x: np.ndarray, kind: Numbers, height: int, width: int, rule: Callable[[float, float], float]) -> np.ndarray:
    found = np.empty_like(x)
    for top in range(0, x.shape[0], height):
        for left in range(0, x.shape[1], width):
            block = x[top : top + height, left : left + width]
            found[top : top + height, left : left + width] = plain_rounded(block, kind, rule(float(np.abs(block).max()), kind.values[-1]))
    return found


def blockwise_rule(amax: float, largest: float) -> float:
    return power_below(float(plain_scale(amax, largest)))


def mx_rule(amax: float, largest: float) -> float:
    return 2.0 ** -math.ceil(math.log2(amax / largest))


def random_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Of several magnitudes, so that blocks have scales of their own and some numbers are subnormal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 10 ** torch.randint(-4, 3, (rows, columns), generator=generator).float()


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_every_number_and_every_tie_between_two_is_cast_as_the_format_says_and_beyond_the_largest_it_saturates(kind: Numbers) -> None:
    between = [(low + high) / 2 for low, high in zip(kind.values, kind.values[1:], strict=False)]
    beyond = [kind.values[-1] * 1.01, kind.values[-1] * 16, math.inf]
    x = torch.tensor([*kind.values, *between, *beyond])
    x = torch.cat([x, -x, random_matrix(10, 50).flatten()])
    expected = [kind.nearest(value) for value in x.tolist()]
    assert rounded(x, torch.tensor(1.0), kind.dtype).tolist() == expected
    assert rounded(torch.tensor([math.nan]), torch.tensor(1.0), kind.dtype).isnan().all()


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_a_tensors_largest_value_becomes_the_types_largest_number(kind: Numbers) -> None:
    x = random_matrix(9, 14)
    scale = scale_of(amax_of(x), kind.dtype)
    assert float(scale) == plain_scale(float(x.abs().max()), kind.values[-1])
    assert float((x.abs().max() * scale).to(kind.dtype).float()) == kind.values[-1]
    np.testing.assert_array_equal(rounded(x, scale, kind.dtype).numpy(), plain_rounded(x.numpy(), kind, float(scale)).astype(np.float32))


def test_nothing_but_zeros_infinity_and_values_too_small_for_a_scale_have_finite_scales() -> None:
    amax = torch.tensor([0.0, math.inf, 1e-44, 448.0])
    assert scale_of(amax, E4M3).tolist() == [1.0, 1.0, torch.finfo(torch.float32).max, 1.0]
    assert float(amax_of(torch.zeros(0, 8))) == 0.0
    assert mx_scale_of(torch.tensor([0.0, 448.0, 448.5]), E4M3).tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("block", [(1, 128), (128, 1), (128, 128)], ids=str)
def test_blocks_are_scaled_by_powers_of_two_each_alone_cut_ones_at_the_edges_too(kind: Numbers, block: tuple[int, int]) -> None:
    x = random_matrix(140, 150)[:, :150] if block != (1, 128) else random_matrix(3, 300)
    expected = plain_blocks(x.numpy(), kind, *block, blockwise_rule)
    np.testing.assert_array_equal(block_rounded(x, kind.dtype, block).numpy(), expected)


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
def test_mx_blocks_have_scales_whose_inverse_is_rounded_up_so_that_nothing_saturates(kind: Numbers) -> None:
    x = random_matrix(6, 80)
    expected = plain_blocks(x.numpy(), kind, 1, 32, mx_rule)
    found = block_rounded(x, kind.dtype, (1, 32), mx=True)
    np.testing.assert_array_equal(found.numpy(), expected)
    whole = x.abs().amax() * 2 / 2**3  # half a step of three or fewer bits below the largest value
    assert float((found - x).abs().max()) <= float(whole)


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
def test_delayed_scales_follow_from_the_passes_before_within_the_history(algorithm: str) -> None:
    """Against a list of the passes' largest values; a pass of zeros, or one that overflows, keeps the scale."""
    fp8 = ModelFp8("delayed", amax_history=3, amax_algorithm=algorithm, margin=1)  # type: ignore[arg-type]
    history, passes, scale = AmaxHistory(fp8, E4M3, 1), [], 1.0
    for amax in (2.0, 8.0, 1.0, 1.0, 1.0, 0.0, math.inf, 4.0, 4.0):
        assert float(history.scale) == scale
        history.record(0, torch.tensor([-amax / 2, amax]))
        history.record(0, torch.tensor([amax / 4]))  # less than what the pass has seen
        history.move()
        passes.append(amax)
        counted = max(passes[-3:]) if algorithm == "max" else amax
        if 0 < counted < math.inf:
            scale = 448 / counted / 2


def plain_product(scaling: str, kinds: tuple[str, str]) -> tuple[Callable[[np.ndarray, bool], np.ndarray], ...]:
    """(input or weight along rows?) → rounded, for input, weight and gradient."""
    heights = {"blockwise": (1, 128, 1), "mxfp8": (1, 1, 1)}

    def rounding(position: int, kind: Numbers) -> Callable[[np.ndarray, bool], np.ndarray]:
        def one_scale(x: np.ndarray, along_rows: bool) -> np.ndarray:
            scale = 1.0 if scaling == "delayed" else float(plain_scale(float(np.abs(x).max()), kind.values[-1]))
            return plain_rounded(x, kind, scale)

        def blocks(x: np.ndarray, along_rows: bool) -> np.ndarray:
            height, width = heights[scaling][position], 128 if scaling == "blockwise" else 32
            size = (height, width) if along_rows else (width, height)
            return plain_blocks(x, kind, *size, blockwise_rule if scaling == "blockwise" else mx_rule)

        return blocks if scaling in heights else one_scale

    forward, backward = (TYPES[kind] for kind in kinds)
    return rounding(0, forward), rounding(1, forward), rounding(2, backward)


@pytest.mark.parametrize("format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("scaling", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_a_linears_three_products_are_those_of_rounded_matrices(scaling: str, format: str) -> None:
    """Forward e4m3 × e4m3, the input's gradient (gradient × weight), the weight's gradient (gradientᵀ × input), blocks along what is summed."""
    fp8 = Fp8(student=scaling, format=format, emulated=True).of_student  # type: ignore[arg-type]
    assert fp8 is not None
    x, weight, gradient = random_matrix(40, 144, 1).requires_grad_(), random_matrix(48, 144, 2).requires_grad_(), random_matrix(40, 48, 3)
    of_scaling = linear_scaling(fp8, None)
    output = RoundedProduct.apply(x, weight, of_scaling.input(x.detach()), of_scaling.weight(weight.detach()), of_scaling, ONE_RANK)
    output.backward(gradient)
    of_input, of_weight, of_gradient = plain_product(scaling, ("e4m3", "e5m2" if format == "hybrid" else "e4m3"))
    plain_x, plain_weight, plain_gradient = (tensor.detach().numpy() for tensor in (x, weight, gradient))
    expected = [
        of_input(plain_x, True) @ of_weight(plain_weight, True).T,
        of_gradient(plain_gradient, True) @ of_weight(plain_weight, False),
        of_gradient(plain_gradient, False).T @ of_input(plain_x, False),
    ]
    for found, plain in zip((output, x.grad, weight.grad), expected, strict=True):
        assert found is not None
        # fp32 sums of up to 144 products in another order; a rounding that differs anywhere is 2^-4 of a product
        np.testing.assert_allclose(found.detach().numpy(), plain, rtol=0, atol=2e-6 * float(np.abs(plain).max()))


def test_a_recomputed_pass_has_the_scales_of_its_first_run_and_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As megatron runs it: first without gradients, again in the backward pass, when the scales have moved on."""
    fp8 = ModelFp8("delayed", amax_history=4, emulated=True)
    scaling, recomputing = DelayedScaling(fp8, Types.of(fp8)), {"now": False}
    monkeypatch.setattr("minitron_megatron.model.fp8.emulation.delayed.is_checkpointing", lambda: recomputing["now"])
    group = type("OneRank", (), {"size": lambda self: 1})()
    x = random_matrix(4, 8)
    first = []
    recomputing["now"] = True
    for number in (1, 2):
        with torch.no_grad():
            first.append(scaling.input(number * x).along_rows)
        move_together([scaling.ahead], group)
    recorded = scaling.ahead.amax.clone()
    again = [scaling.input(number * x).along_rows for number in (1, 2)]
    assert [torch.equal(a, b) for a, b in zip(first, again, strict=True)] == [True, True]
    assert torch.equal(scaling.ahead.amax, recorded)
    assert not torch.equal(first[0], rounded(x, scaling.ahead.scale[0], E4M3))  # the scales did move


def test_validation_leaves_no_trace_in_delayed_scaling() -> None:
    scaling = DelayedScaling(ModelFp8("delayed", amax_history=4), Types.of(ModelFp8("delayed")))
    with torch.no_grad():
        scaling.eval().input(random_matrix(4, 8))
    assert not scaling.ahead.amax.any()
    assert list(scaling.state_dict()) == []


def test_nvfp4_is_refused_with_what_to_choose() -> None:
    with pytest.raises(RecipeError, match="choose mxfp8"):
        linear_scaling(ModelFp8("nvfp4", emulated=True), None)
