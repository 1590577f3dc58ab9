"""GroupAdamW: torch's fused AdamW to the bit, with the state that megatron's distributed optimizer can save and load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from minitron_megatron.errors import PlatformError
from minitron_megatron.platform.group_adam import GroupAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


class Trained:
    """Three parameters in two groups and seeded gradients; at every third step one parameter has none."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.parameters = [torch.nn.Parameter(torch.randn(rows, 5, generator=self.random)) for rows in (3, 7, 100)]
        self.optimizer = make(self.groups(), **SETTINGS)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": self.parameters[:2], "weight_decay": 0.1}, {"params": self.parameters[2:], "weight_decay": 0.0}]

    def steps(self, count: int, *, gaps: bool = False) -> None:
        for step in range(count):
            for number, parameter in enumerate(self.parameters):
                gradient = torch.randn(parameter.shape, generator=self.random)
                parameter.grad = None if gaps and number == 1 and step == 0 else gradient
            self.optimizer.step()


def test_every_update_is_that_of_torchs_plain_adamw() -> None:
    theirs, ours = Trained(torch.optim.AdamW), Trained(GroupAdamW)
    for trained in (theirs, ours):
        trained.steps(7)
    for mine, expected in zip(ours.parameters, theirs.parameters, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)  # fp32 weights around 1, whose last bit the fused function rounds otherwise
    assert [group["step"] for group in ours.optimizer.param_groups] == [7, 7]
    assert {name for state in ours.optimizer.state.values() for name in state} == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("threads", [1, 3])
def test_the_bits_are_torchs_wherever_a_tensor_is_cut(threads: int) -> None:
    """A million elements, whole vectors all of them, by torch's fused AdamW; ours has them in parts of odd lengths."""
    random, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    whole = torch.nn.Parameter(torch.randn(1_000_000, generator=random))
    cuts = [1, 7, 16, 47, 100_000, 33_333]
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().split([*cuts, whole.numel() - sum(cuts)])]
    theirs, ours = torch.optim.AdamW([whole], weight_decay=0.1, fused=True, **SETTINGS), GroupAdamW(parts, weight_decay=0.1, **SETTINGS)
    try:
        torch.set_num_threads(threads)
        for _ in range(5):
            whole.grad = torch.randn(whole.shape, generator=random) * torch.rand(whole.shape, generator=random) ** 8
            for part, gradient in zip(parts, whole.grad.split([part.numel() for part in parts]), strict=True):
                part.grad = gradient.clone()
            theirs.step()
            ours.step()
    finally:
        torch.set_num_threads(before)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(torch.cat([ours.state[part][name] for part in parts]), theirs.state[whole][name])
    assert torch.equal(torch.cat([part.detach() for part in parts]), whole)


def test_a_state_that_was_saved_and_loaded_goes_on_to_the_bit() -> None:
    whole, first = Trained(GroupAdamW), Trained(GroupAdamW)
    whole.steps(7)
    first.steps(4)
    second = Trained(GroupAdamW)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    for mine, theirs in zip(second.parameters, first.parameters, strict=True):
        mine.data.copy_(theirs.data)
    second.random = first.random
    second.steps(3)
    assert all(torch.equal(a, b) for a, b in zip(second.parameters, whole.parameters, strict=True))


def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    trained = Trained(GroupAdamW)
    before = trained.parameters[1].detach().clone()
    trained.steps(1, gaps=True)
    assert torch.equal(trained.parameters[1], before)
    assert trained.parameters[1] not in trained.optimizer.state


def test_what_torch_restores_from_one_shared_count_is_wrong() -> None:
    """The reason for this class: megatron-core gives every parameter the same tensor, and each of four adds 1 to it."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
    optimizer, step = torch.optim.AdamW(parameters), torch.tensor(5.0)
    state = {number: {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3), "step": step} for number in range(4)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    optimizer.step()
    assert [float(optimizer.state[parameter]["step"]) for parameter in parameters] == [9.0] * 4


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(PlatformError, match="decoupled weight decay"):
        GroupAdamW([torch.nn.Parameter(torch.ones(1))], adam_w_mode=False)


def test_megatron_takes_it_on_cpu() -> None:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    assert optimizer.Adam is distrib_optimizer.Adam is GroupAdamW
    assert distrib_optimizer.HAVE_APEX_OR_TE and not optimizer.USING_PYTORCH_OPTIMIZER
