"""Window sums, log-likelihoods and greedy continuations of every layout against a plain fp64 model with whole logits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from _pytest.monkeypatch import MonkeyPatch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.evaluate import compare as comparison
from minitron_megatron.evaluate import scoring
from minitron_megatron.evaluate.scoring import Request, loglikelihoods
from minitron_megatron.model.build import build_model
from minitron_megatron.model.generate import generate
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.world import World

from .conftest import Record
from .plain_model import PlainModel
from .pool import Pool
from .tiny import (
    DP2,
    LLAMA,
    ONE,
    PP2,
    QWEN2_TIED,
    TP2,
    TP2_SP,
    VOCAB,
    RandomSamples,
    layout_name,
    relative_difference,
    teacher_of,
    write_random,
)

WINDOWS, LAYOUTS = 11, (ONE, TP2, TP2_SP, PP2, DP2)  # an odd number of windows: data-parallel ranks have unlike shares
MODELS = {"teacher": teacher_of(LLAMA), "pruned": LLAMA, "distilled": LLAMA}
PROMPT, TOKENS = [5, 77, 130], 5
Shapes = dict[str, Architecture]


def window_sums(world: World, parallel: Parallel, folder: Path) -> dict[str, Tensor]:
    layout = global_layout(parallel, world)
    models = {name: build_model(arch, layout, world.platform, torch.float32, variable_lengths=True) for name, arch in MODELS.items()}
    for name, model in models.items():
        load_model(model, folder / name)
    with MonkeyPatch.context() as patch:
        patch.setattr(comparison, "CHUNK_TOKENS", 5)  # the last chunk of a window is smaller
        patch.setattr(comparison, "WINDOWS_AT_A_TIME", 4)
        return comparison.compare(models, RandomSamples(WINDOWS), world, what="random tokens")


def score(world: World, parallel: Parallel, arch: Architecture, folder: Path, requests: list[Request], batch_tokens: int) -> list[tuple[float, bool]]:
    layout = global_layout(parallel, world)
    model = build_model(arch, layout, world.platform, torch.float32, variable_lengths=True)
    load_model(model, folder)
    with MonkeyPatch.context() as patch:
        patch.setattr(scoring, "BATCH_TOKENS", batch_tokens)
        return loglikelihoods(model, requests)


def continue_greedily(world: World, parallel: Parallel, arch: Architecture, folder: Path, stops: list[int]) -> list[list[int]]:
    layout = global_layout(parallel, world)
    model = build_model(arch, layout, world.platform, torch.float32, variable_lengths=True)
    load_model(model, folder)
    return [generate(model, torch.tensor([PROMPT]), new_tokens=TOKENS, eod=eod)[0] for eod in stops]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    for seed, (name, arch) in enumerate({**MODELS, "tied": QWEN2_TIED}.items()):
        write_random(models / name, arch, seed=seed)
    return models


@pytest.fixture(scope="module")
def naive_sums(folder: Path) -> dict[str, Tensor]:
    """[windows, 3] nll, KL to the teacher, equal top-1: softmax over whole logits."""
    samples = RandomSamples(WINDOWS).tokens
    tokens, labels = samples[:, :-1], samples[:, 1:]
    with torch.no_grad():
        logs = {name: PlainModel(folder / name, arch).logits(tokens).log_softmax(-1) for name, arch in MODELS.items()}
    teacher = logs["teacher"]
    return {
        name: torch.stack(
            [
                -log.gather(-1, labels[..., None])[..., 0].sum(-1),
                (teacher.exp() * (teacher - log)).sum((-1, -2)),
                (log.argmax(-1) == teacher.argmax(-1)).double().sum(-1),
            ],
            dim=-1,
        )
        for name, log in logs.items()
    }


@pytest.mark.parametrize("parallel", LAYOUTS, ids=layout_name)
def test_window_sums_equal_a_softmax_over_whole_logits(
    pool: Pool, folder: Path, naive_sums: dict[str, Tensor], measured: Record, parallel: Parallel
) -> None:
    for found in pool.run(window_sums, parallel, folder, processes=parallel.processes):  # equal on every process
        for name, expected in naive_sums.items():
            difference = max(relative_difference(found[name][:, column], expected[:, column]) for column in (0, 1))
            assert measured("window sums against plain fp64", layout_name(parallel), difference) <= 1e-5  # fp32 against fp64
            assert torch.equal(found[name][:, 2], expected[:, 2])  # whole numbers: no two logits are that close here


@pytest.fixture(scope="module")
def requests(folder: Path) -> list[Request]:
    """Random contexts and continuations of many lengths, and for some the model's own greedy choice."""
    dice = random.Random(3)

    def tokens(most: int) -> list[int]:
        return [dice.randrange(VOCAB) for _ in range(dice.randint(1, most))]

    made = [(tokens(20), tokens(7)) for _ in range(20)]
    plain = PlainModel(folder / "tied", QWEN2_TIED)
    return made + [(context, naive_continuation(plain, context, 3, eod=-1)) for context, _ in made[:4]]


def naive_continuation(plain: PlainModel, prompt: list[int], tokens: int, *, eod: int) -> list[int]:
    sequence = list(prompt)
    while len(sequence) < len(prompt) + tokens:
        with torch.no_grad():
            chosen = int(plain.logits(torch.tensor([sequence]))[0, -1].argmax())
        sequence.append(chosen)
        if chosen == eod:
            break
    return sequence[len(prompt) :]


def naive_score(plain: PlainModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One request, not padded, one token after another."""
    with torch.no_grad():
        log = plain.logits(torch.tensor([context + continuation]))[0].log_softmax(-1)
    places = [(len(context) - 1 + step, token) for step, token in enumerate(continuation)]
    return sum(float(log[place, token]) for place, token in places), all(int(log[place].argmax()) == token for place, token in places)


@pytest.mark.parametrize("parallel", LAYOUTS, ids=layout_name)
def test_loglikelihoods_equal_one_request_after_another(
    pool: Pool, folder: Path, requests: list[Request], measured: Record, parallel: Parallel
) -> None:
    plain = PlainModel(folder / "tied", QWEN2_TIED)
    expected = [naive_score(plain, *request) for request in requests]
    assert [greedy for _, greedy in expected[-4:]] == [True] * 4
    for found in pool.run(score, parallel, QWEN2_TIED, folder / "tied", requests, 100, processes=parallel.processes):
        difference = relative_difference([total for total, _ in found], [total for total, _ in expected])
        assert measured("log-likelihoods against plain fp64", layout_name(parallel), difference) <= 1e-5  # fp32 against fp64
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("parallel", [ONE, TP2_SP, DP2], ids=layout_name)
def test_padding_does_not_change_a_score(pool: Pool, folder: Path, requests: list[Request], parallel: Parallel) -> None:
    """All requests in one padded batch against each in a batch of its own; fewer batches than data-parallel ranks as well."""
    together, alone = (
        pool.run(score, parallel, QWEN2_TIED, folder / "tied", requests, tokens, processes=parallel.processes)[0] for tokens in (10_000, 1)
    )
    # other shapes of a matmul sum in another order: fp32
    assert relative_difference([total for total, _ in together], [total for total, _ in alone]) <= 1e-6
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=layout_name)
def test_a_greedy_continuation_is_argmax_after_argmax_and_stops_at_eod(pool: Pool, folder: Path, parallel: Parallel) -> None:
    plain = PlainModel(folder / "tied", QWEN2_TIED)
    endless = naive_continuation(plain, PROMPT, TOKENS, eod=-1)
    stops = [-1, endless[-2]]
    expected = [naive_continuation(plain, PROMPT, TOKENS, eod=eod) for eod in stops]
    assert len(expected[1]) < TOKENS
    found = pool.run(continue_greedily, parallel, QWEN2_TIED, folder / "tied", stops, processes=parallel.processes)
    assert found == [expected] * parallel.processes
