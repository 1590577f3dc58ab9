"""Sequences shared out over context ranks: loss and gradients of the first distillation step against a plain computation and one process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.config.distill import HiddenLoss
from minitron_megatron.config.parallel import Parallel, TeacherParallel
from minitron_megatron.model.modules import CausalAttention
from minitron_megatron.parallel.context import part_of_rank
from minitron_megatron.parallel.world import World

from .conftest import Record
from .first_step import FirstStep, Pair, plain_first_step, run_first_step, settings
from .house import copy_of, publish_stage, recipe_for
from .pool import Pool
from .tiny import CP2, LLAMA, ONE, QWEN2_TIED, layout_name, name_of, relative_difference, with_teacher, worst_difference

STUDENTS = {"llama": LLAMA, "qwen2_tied": QWEN2_TIED}
HIDDEN = HiddenLoss(pairs=[(1, 0), (4, 3)], weight=0.7)
LAYOUTS = [
    ("llama", CP2),
    pytest.param("qwen2_tied", Parallel(context=4), marks=pytest.mark.slow),
    ("llama", Parallel(tensor=2, context=2, sequence=True)),
    pytest.param("qwen2_tied", Parallel(context=2, pipeline=2, teacher="student"), marks=pytest.mark.slow),
    pytest.param("llama", Parallel(context=2, pipeline=2, virtual=2), marks=pytest.mark.slow),
    pytest.param("llama", with_teacher(Parallel(context=2, data=2), TeacherParallel(tensor=2, sequence=True)), marks=pytest.mark.slow),
    ("llama", with_teacher(Parallel(tensor=2, context=2), TeacherParallel(pipeline=2))),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {name: Pair(arch, tmp_path_factory.mktemp(name)).written() for name, arch in STUDENTS.items()}


@pytest.fixture(scope="module")
def references(pool: Pool, pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[FirstStep]]:
    """The plain fp64 computation, and one process of the package's own."""
    folder, distill = tmp_path_factory.mktemp("one_process"), settings(hidden=HIDDEN)
    return {name: [plain_first_step(pair, distill), run_first_step(pool, ONE, pair, distill, folder / name)] for name, pair in pairs.items()}


@pytest.mark.parametrize(("shape", "parallel"), LAYOUTS, ids=name_of)
def test_loss_and_every_gradient_of_the_first_step_equal_a_plain_computation_and_one_process(
    pool: Pool, measured: Record, pairs: dict[str, Pair], references: dict[str, list[FirstStep]], tmp_path: Path, shape: str, parallel: Parallel
) -> None:
    """Losses on hidden states among them: they and the weights of the tokens are cut like the tokens, whose weights are all different."""
    found = run_first_step(pool, parallel, pairs[shape], settings(hidden=HIDDEN), tmp_path / "gradients")
    for reference in references[shape]:
        losses = [relative_difference(getattr(found, name), getattr(reference, name)) for name in ("kl", "cross_entropy", "hidden")]
        gradients = [worst_difference(getattr(found, name), getattr(reference, name)) for name in ("gradients", "projections")]
        assert found.tokens == reference.tokens
        layout = layout_name(parallel)
        assert measured("context parallel: losses", layout, max(losses)) <= 1e-6  # fp32 sums in another order (design: numbers that must not move)
        assert measured("context parallel: gradients", layout, max(gradients)[0]) <= 1e-5, max(gradients)
        assert measured("context parallel: gradient norm", layout, relative_difference(found.gradient_norm, reference.gradient_norm)) <= 1e-6


def attention_inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Queries [S, B, h, K], keys and values [S, B, g, K], and a gradient of the result: 24 tokens, 6 heads in 2 groups."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(24, 2, heads, 8, generator=generator).to(dtype) for heads in (6, 2, 2)]
    return parts, torch.randn(24, 2, 48, generator=generator).to(dtype)


def attention_of_a_rank(world: World, dtype: torch.dtype) -> list[Tensor]:
    """The result and three gradients, of this rank's tokens."""
    group: Any = SimpleNamespace(cp=dist.group.WORLD)
    config: Any = SimpleNamespace(kv_channels=8, context_parallel_size=world.size)
    parts, gradient = attention_inputs(dtype)
    own = [part_of_rank(part, 0, world.rank, world.size).requires_grad_() for part in parts]
    found = CausalAttention(config, pg_collection=group)(*own)
    return [x.detach() for x in (found, *torch.autograd.grad(found, own, part_of_rank(gradient, 0, world.rank, world.size)))]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_each_rank_has_its_tokens_attention_and_gradients_of_the_whole(pool: Pool, ranks: int, dtype: torch.dtype, tolerance: float) -> None:
    """Against scores in fp64 that are all written down; bf16 has 8 significant bits."""
    parts, gradient = attention_inputs(dtype)
    query, key, value = leaves = [part.double().requires_grad_() for part in parts]
    scores = torch.einsum("sbhk,tbhk->bhst", query, key.repeat_interleave(3, 2)) / 8**0.5
    future = torch.ones(24, 24, dtype=torch.bool).triu(1)
    whole = torch.einsum("bhst,tbhk->sbhk", scores.masked_fill(future, -torch.inf).softmax(-1), value.repeat_interleave(3, 2)).flatten(2)
    expected = [whole, *torch.autograd.grad(whole, leaves, gradient.double())]
    for rank, found in enumerate(pool.run(attention_of_a_rank, dtype, processes=ranks)):
        for ours, theirs in zip(found, expected, strict=True):
            part = part_of_rank(theirs.detach(), 0, rank, ranks)
            assert (ours.double() - part).abs().max() <= tolerance * theirs.abs().max()


def distilled(pool: Pool, house: Path, runs: Path, parallel: Parallel) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of the steps and of the held-out windows."""
    recipe = recipe_for(copy_of(house, runs), parallel, steps=3, validate_every_steps=3, learning_rate={"warmup_steps": 1})
    pool.run(publish_stage, "distill", recipe, processes=parallel.processes)
    files = (runs / "tiny" / "distill" / name for name in ("metrics.jsonl", "validation.jsonl"))
    steps, windows = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    return steps, windows


def test_the_stage_trains_and_validates_as_one_process_does(pool: Pool, house: Path, tmp_path: Path, measured: Record) -> None:
    """Losses of each held-out window are added up over the ranks that share it; three steps, in which Adam carries rounding into the weights."""
    (steps, windows), (one_steps, one_windows) = (distilled(pool, house, tmp_path / layout_name(layout), layout) for layout in (CP2, ONE))
    assert [len(windows), len(windows[0]["forward_kl"])] == [2, 5]
    differences = [relative_difference(a[name], b[name]) for a, b in zip(steps[1:], one_steps[1:], strict=True) for name in ("loss", "gradient_norm")]
    differences += [
        relative_difference(a[name], b[name]) for a, b in zip(windows, one_windows, strict=True) for name in ("forward_kl", "cross_entropy")
    ]
    assert measured("context parallel: three steps of the stage", "cp2", max(differences)) <= 1e-5
