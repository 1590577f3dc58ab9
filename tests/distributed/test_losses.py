"""Every loss of the output layer over a vocabulary on one, two and four tensor ranks, against whole logits in fp64; and in the first step.

Legend: N tokens, V vocabulary, v a rank's rows, D student's hidden, E a teacher's hidden.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from plain_losses import cross_entropy, token_losses
from torch import Tensor

from minitron_megatron.config.parallel import Parallel
from minitron_megatron.model.gpt import padded_vocab
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.training import kd_loss
from minitron_megatron.training.kd_loss import fused_distillation_loss
from minitron_megatron.training.losses.settings import LossSettings
from minitron_megatron.training.losses.target import TokenLabels, WeightedTarget

from .conftest import Record
from .first_step import Pair, plain_first_step, run_first_step
from .first_step import settings as of_distill
from .pool import Pool
from .test_first_step import check
from .tiny import DP2, LLAMA, PP2, PP2_EVEN, QWEN2_TIED, TP2_SP, VOCAB, WIDE, layout_name, name_of, relative_difference

N, D, E = 19, 12, 20
ALL = {"forward_kl": 0.7, "reverse_kl": 0.3, "jensen_shannon": 1.3, "mse": 0.2, "cosine": 3.0, "cross_entropy": 0.4}
CASES = {
    **{name: LossSettings({name: 1.0}, temperature=2.0, chunk_tokens=8) for name in ALL},
    "all": LossSettings(ALL, chunk_tokens=8),
    "top 5": LossSettings({"forward_kl": 0.6, "cross_entropy": 0.4}, temperature=2.0, chunk_tokens=8, top_k=5),
    "top 60": LossSettings(chunk_tokens=8, top_k=60),  # more than the 33 rows of one of four ranks
    "labels": LossSettings({"cross_entropy": 1.0}, chunk_tokens=8, has_teacher=False),
}


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: TokenLabels
    teachers: list[WeightedTarget]


class Found(NamedTuple):
    total: Tensor
    sums: dict[str, Tensor]
    grad_hidden: Tensor
    grad_weight: Tensor


def inputs() -> Inputs:
    """The teachers' logits are in halves, so that many are equal at the top-K's cut."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = torch.rand(N, generator=generator) * torch.randint(2, (N,), generator=generator)
    labels = TokenLabels(torch.randint(VOCAB, (N,), generator=generator), weights)
    coarse = [torch.randint(-2, 3, shape, generator=generator).float() for shape in ((N, E), (VOCAB, E))]
    teachers = [WeightedTarget(coarse[0], coarse[1] / 4, 0.4), WeightedTarget(draw(N, 2 * E), draw(VOCAB, 2 * E) * 0.3, 0.6)]
    return Inputs(draw(N, D), draw(VOCAB, D) * 0.5, labels, teachers)


def fused(world: World, tensor: int) -> dict[str, Found]:
    return fused_over(global_layout(Parallel(tensor=tensor), world).groups.tp)


def fused_over(group: Any) -> dict[str, Found]:
    """Of this rank: sums are whole, the hidden states' gradient is its part, the weight's its rows."""
    tensor, given = group.size(), inputs()
    rows = padded_vocab(VOCAB, tensor) // tensor
    mine = slice(group.rank() * rows, min((group.rank() + 1) * rows, VOCAB))

    def shard(weight: Tensor) -> Tensor:
        padded = torch.full((rows, weight.shape[1]), 7.0)  # rows behind the vocabulary must not count
        padded[: mine.stop - mine.start] = weight[mine]
        return padded

    found = {}
    for name, settings in CASES.items():
        hidden, weight = given.hidden.clone().requires_grad_(), shard(given.weight).requires_grad_()
        targets = [WeightedTarget(item.hidden_NE, shard(item.weight_vE), item.weight) for item in given.teachers] if settings.has_teacher else []
        total, sums = fused_distillation_loss(hidden, weight, given.labels, targets, settings, rows=mine.stop - mine.start, group=group)
        total.backward()
        assert hidden.grad is not None and weight.grad is not None
        assert weight.grad[mine.stop - mine.start :].abs().sum() == 0
        found[name] = Found(total.detach(), sums, hidden.grad, weight.grad[: mine.stop - mine.start])
    return found


def plain(settings: LossSettings) -> Found:
    given = inputs()
    hidden, weight = given.hidden.double().requires_grad_(), given.weight.double().requires_grad_()
    student = hidden @ weight.t()
    found = {"cross_entropy": cross_entropy(student, given.labels.labels_N)}
    for item in given.teachers if settings.has_teacher else []:
        logits = item.hidden_NE.double() @ item.weight_vE.double().t()
        for name, loss in token_losses(student, logits, settings.temperature, settings.top_k).items():
            found[name] = found.get(name, 0) + item.weight * loss
    sums = {name: (found[name] * given.labels.token_weights_N).sum() for name in settings.names}
    total = settings.total(sums)
    total.backward()
    assert hidden.grad is not None and weight.grad is not None
    return Found(total.detach(), {name: value.detach() for name, value in sums.items()}, hidden.grad, weight.grad)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_losses_and_gradients_are_those_of_whole_logits_on_any_number_of_tensor_ranks(pool: Pool, measured: Record, tensor: int) -> None:
    ranks = pool.run(fused, tensor, processes=tensor)
    for name, settings in CASES.items():
        expected, answers = plain(settings), [answer[name] for answer in ranks]
        assert all(torch.equal(answer.total, answers[0].total) for answer in answers)
        loss = max(relative_difference(answers[0].sums[key], value) for key, value in expected.sums.items())
        loss = max(loss, relative_difference(answers[0].total, expected.total))
        hidden = relative_difference(sum(answer.grad_hidden for answer in answers), expected.grad_hidden)
        weight = relative_difference(torch.cat([answer.grad_weight for answer in answers]), expected.grad_weight)
        # fp32 sums in another order
        assert measured("every loss of the output layer: loss", f"tp{tensor}", loss) <= 1e-6, name
        assert measured("every loss of the output layer: gradients", f"tp{tensor}", max(hidden, weight)) <= 1e-5, name


def overlapped_and_not(world: World) -> tuple[list[str], list[bool]]:
    """The order of the halves of three chunks, and whether each case's results are those of one chunk at a time."""
    group, order = global_layout(Parallel(tensor=2), world).groups.tp, list[str]()
    halves = {name: getattr(kd_loss, name) for name in ("begin", "finish")}

    def written_down(name: str) -> Any:
        return lambda *args, **keywords: (order.append(name), halves[name](*args, **keywords))[1]

    with patch.multiple(kd_loss, **{name: written_down(name) for name in halves}):
        overlapped = fused_over(group)
    with patch.object(kd_loss, "chunks_in_flight", lambda group: 1):
        plain = fused_over(group)
    same = [torch.equal(a, b) for name in CASES for a, b in zip(flat(overlapped[name]), flat(plain[name]), strict=True)]
    return order[: len(order) // len(CASES)], same


def flat(found: Found) -> list[Tensor]:
    return [found.total, *found.sums.values(), found.grad_hidden, found.grad_weight]


def test_a_chunk_is_gathered_while_the_next_one_is_made_and_no_bit_changes(pool: Pool) -> None:
    for order, same in pool.run(overlapped_and_not, processes=2):
        assert order == ["begin", "begin", "finish", "begin", "finish", "finish"]  # 19 tokens = 8 + 8 + 3
        assert len(same) > 4 * len(CASES) and all(same)


MIXES = {
    "kinds": of_distill(loss={"reverse_kl": 0.7, "jensen_shannon": 0.6, "cross_entropy": 0.2}, temperature=2.0),
    "distances": of_distill(loss={"cosine": 3.0, "mse": 0.1}),
    "top 5": of_distill(loss={"forward_kl": 0.8, "cross_entropy": 0.2}, top_k=5),
}
SHAPES = {"llama": LLAMA, "tied": QWEN2_TIED, "wide tied": replace(WIDE, tied_embeddings=True)}
TP4_SP = Parallel(tensor=4, sequence=True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {name: Pair(arch, tmp_path_factory.mktemp(name)).written() for name, arch in SHAPES.items()}


@pytest.mark.parametrize(
    ("mix", "shape", "parallel"),
    [
        ("kinds", "llama", PP2),
        ("kinds", "tied", TP2_SP),
        ("distances", "tied", PP2_EVEN),
        ("distances", "llama", TP2_SP),
        ("top 5", "tied", TP2_SP),
        ("top 5", "llama", PP2),
        ("top 5", "wide tied", TP4_SP),
        ("kinds", "wide tied", TP4_SP),
        *(pytest.param(mix, "llama", DP2, marks=pytest.mark.slow) for mix in MIXES),
    ],
    ids=name_of,
)
def test_the_first_step_on_other_losses_is_that_of_a_plain_computation(
    pool: Pool, measured: Record, pairs: dict[str, Pair], tmp_path: Path, mix: str, shape: str, parallel: Parallel
) -> None:
    found = run_first_step(pool, parallel, pairs[shape], MIXES[mix], tmp_path / "gradients")
    expected = plain_first_step(pairs[shape], MIXES[mix])
    assert found.others.keys() == expected.others.keys() != set()
    apart = max(relative_difference(found.others[name], value) for name, value in expected.others.items())
    assert measured("first step, other losses: their values", layout_name(parallel), apart) <= 1e-6  # fp32 against fp64
    check(found, expected, measured, layout_name(parallel), "first step, other losses")
