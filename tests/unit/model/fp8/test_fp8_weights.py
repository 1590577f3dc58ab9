"""FP8 weights, told by stand-ins: Transformer Engine's own need a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from minitron_megatron.model.fp8 import weights as fp8_weights


class Rounded(nn.Parameter):
    """Bytes and scales behind a weight, as Transformer Engine's Float8Tensor has them."""


@pytest.fixture(autouse=True)
def _stand_ins_are_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_weights, "is_float8tensor", lambda tensor: isinstance(tensor, Rounded))


def rounded(rows: int, columns: int, *, transposed: bool = False) -> Rounded:
    weight = Rounded(torch.zeros(rows, columns, dtype=torch.bfloat16))
    weight.__dict__.update(_data=torch.zeros(rows, columns, dtype=torch.uint8), _scale_inv=torch.ones(1), _transpose=None)
    if transposed:
        weight.__dict__["_transpose"] = torch.zeros(columns, rows, dtype=torch.uint8)
    return weight


def test_an_fp8_weight_takes_a_byte_an_element_and_its_scales_and_its_transposed_copy() -> None:
    plain = nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))
    assert fp8_weights.weight_bytes([plain]) == 30
    assert fp8_weights.weight_bytes([rounded(3, 5)]) == 15 + 4
    assert fp8_weights.weight_bytes([rounded(3, 5, transposed=True)]) == 15 + 15 + 4
    assert fp8_weights.weight_bytes([plain, plain, plain.data]) == 30  # tied weights are there once


def test_the_main_copy_begins_with_what_the_checkpoint_has_and_not_with_what_memory_held() -> None:
    model = nn.Linear(2, 1)
    setattr(model.weight, fp8_weights.INITIAL_VALUE, torch.full((1, 2), float("nan")))  # as built, before anything is loaded
    loaded = {"weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]])[:, ::2].t(), "bias": torch.tensor([5.0])}
    fp8_weights.set_initial_values(model.named_parameters(), loaded)
    value: Tensor = getattr(model.weight, fp8_weights.INITIAL_VALUE)
    assert value.tolist() == [[1.0, 3.0]]
    assert value.is_contiguous()  # megatron flattens it by view
    assert not hasattr(model.bias, fp8_weights.INITIAL_VALUE)


def test_copies_are_completed_of_fp8_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Tensor]] = []
    monkeypatch.setattr(fp8_weights, "post_all_gather_processing", seen.append)
    weight = rounded(1, 1)
    fp8_weights.complete_copies([nn.Parameter(torch.zeros(1)), weight])
    fp8_weights.complete_copies([nn.Parameter(torch.zeros(1))])
    assert len(seen) == 1 and seen[0] == [weight]


def test_fp8_weights_are_written_as_plain_tensors_and_others_as_they_are() -> None:
    weight, plain = rounded(2, 2), nn.Parameter(torch.zeros(1))
    weight.dequantize = lambda: torch.full((2, 2), 3.0)  # type: ignore[method-assign]
    state = {"model0": {"fp8": SimpleNamespace(data=weight), "bf16": SimpleNamespace(data=plain)}}
    fp8_weights.put_plain_values(state)
    assert type(state["model0"]["fp8"].data) is Tensor and float(state["model0"]["fp8"].data[1, 1]) == 3.0
    assert state["model0"]["bf16"].data is plain
