"""Sequences shared out over context ranks: loss and gradients of the first distillation step against a plain computation and one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_megatron.config.distill import HiddenLoss
from minitron_megatron.config.parallel import Parallel, TeacherParallel

from .conftest import Record
from .first_step import FirstStep, Pair, plain_first_step, run_first_step, settings
from .pool import Pool
from .tiny import LLAMA, ONE, QWEN2_TIED, layout_name, name_of, relative_difference, with_teacher, worst_difference, write_random

STUDENTS = {"llama": LLAMA, "qwen2_tied": QWEN2_TIED}
HIDDEN = HiddenLoss(pairs=[(1, 0), (4, 3)], weight=0.7)
CP2 = Parallel(context=2)
LAYOUTS = [
    ("llama", CP2),
    ("qwen2_tied", Parallel(context=4)),
    ("llama", Parallel(tensor=2, context=2, sequence=True)),
    ("qwen2_tied", Parallel(context=2, pipeline=2, teacher="student")),
    ("llama", Parallel(context=2, pipeline=2, virtual=2)),
    ("llama", with_teacher(Parallel(context=2, data=2), TeacherParallel(tensor=2, sequence=True))),
    ("llama", with_teacher(Parallel(tensor=2, context=2), TeacherParallel(pipeline=2))),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    found = {name: Pair(arch, tmp_path_factory.mktemp(name)) for name, arch in STUDENTS.items()}
    for pair in found.values():
        write_random(pair.folder / "teacher", pair.teacher, seed=1, scale=0.2)
        write_random(pair.folder / "student", pair.student, seed=2, scale=0.2)
    return found


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
