"""Emulated FP8 in training: layouts against one process, recomputation, scales that go on with a run, and what a teacher's weights become."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from minitron_megatron.artifact import find_artifact
from minitron_megatron.checkpoint.sharded import load_model
from minitron_megatron.checkpoint.torch_dist import TorchDistReader
from minitron_megatron.config.distill import Training
from minitron_megatron.config.fp8 import Fp8, ModelFp8
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.data.batches import collate
from minitron_megatron.model.build import build_model
from minitron_megatron.model.fp8.emulation.linear import EmulatedLinear
from minitron_megatron.model.fp8.emulation.rounding import E4M3, E5M2, amax_of, rounded, scale_of
from minitron_megatron.model.fp8.state import scaling_state
from minitron_megatron.model.run import forward_only
from minitron_megatron.parallel.layout import global_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.training.scaling_checkpoint import load_scaling

from .conftest import Identical, Record
from .first_step import FirstStep, Pair, accumulate, first_step, load_pair, run_first_step, settings
from .house import copy_of, publish_stage, recipe_for
from .pool import Pool
from .tiny import (
    CP2,
    DP2,
    EP2,
    LLAMA,
    MIXTRAL,
    ONE,
    PP2,
    PP2_VPP2,
    TP2,
    TP2_SP,
    RandomSamples,
    layout_name,
    name_of,
    relative_difference,
    worst_difference,
    write_random,
)
from .training_run import Job, Seen, assembled, train

DELAYED = Fp8(student="delayed", amax_history=3, emulated=True)
STOP, END = 2, 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(LLAMA, tmp_path_factory.mktemp("pair")).written()


FirstSteps = Callable[..., FirstStep]


@pytest.fixture(scope="module")
def step_of(pool: Pool, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> FirstSteps:
    """step_of(scaling, layout, micro_batch=2, recompute="none"): the first step; "none" is fp32."""

    @cache
    def run(scaling: str, layout: str, micro_batch: int = 2, recompute: str = "none") -> FirstStep:
        fp8 = Fp8(student=scaling, emulated=True)  # type: ignore[arg-type]
        written = tmp_path_factory.mktemp("step") / "gradients"
        training = Training(recompute=recompute) if recompute != "none" else None  # type: ignore[arg-type]
        return run_first_step(
            pool,
            LAYOUTS[layout],
            replace(pair, fp8=fp8),
            settings(micro_batch=micro_batch),
            written,
            run=StepWith(training),  # type: ignore[arg-type]
        )

    return run


class StepWith(NamedTuple):
    """first_step under settings of training."""

    training: Training | None

    def __call__(self, *arguments: Any) -> Any:
        return first_step(*arguments, self.training)


LAYOUTS = {layout_name(layout): layout for layout in (ONE, TP2, TP2_SP, PP2, DP2, PP2_VPP2)}
SAME = [
    ("delayed", "tp2_sp", 2),
    ("delayed", "pp2_vpp2", 2),
    ("delayed", "dp2", 4),
    ("tensorwise", "pp2", 2),
    ("tensorwise", "dp2", 2),
    ("blockwise", "tp2", 2),
    ("blockwise", "tp2_sp", 2),
    ("mxfp8", "dp2", 2),
]
"""Scaling, layout, and samples of a rank's micro-batch.

Two data ranks make one pass of delayed scaling together, as one process with twice the samples does; tensorwise scales follow from a rank's own
part of a tensor, so that tensor ranks have others.
"""


@pytest.mark.parametrize(("scaling", "layout", "micro_batch"), SAME)
def test_the_first_step_of_a_layout_is_that_of_one_process(
    step_of: FirstSteps, measured: Record, scaling: str, layout: str, micro_batch: int
) -> None:
    one = step_of(scaling, "one", 8 if (scaling, layout) == ("delayed", "dp2") else 2)
    found = step_of(scaling, layout, micro_batch)
    claim = f"{scaling} FP8 emulated"
    assert measured(f"{claim}: loss against one process", layout, abs(found.kl / one.kl - 1)) <= 1e-6  # fp32: one extra order of sums
    worst, where = worst_difference(found.gradients, one.gradients)
    assert measured(f"{claim}: gradients against one process", layout, worst) <= 1e-5, where


@pytest.mark.parametrize("scaling", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_an_emulated_model_computes_something_else_than_an_fp32_one(step_of: FirstSteps, scaling: str) -> None:
    """e4m3 has steps of a sixteenth: of random weights the gradients differ by tens of per cent, the loss by per mille."""
    plain, found = step_of("none", "one"), step_of(scaling, "one")
    assert worst_difference(found.gradients, plain.gradients)[0] > 0.05
    assert 1e-6 < abs(found.kl / plain.kl - 1) < 0.05


def test_experts_on_two_ranks_make_the_first_step_of_one_process(pool: Pool, measured: Record, tmp_path: Path) -> None:
    """In one pass of delayed scaling, so that no scale has moved; some experts see no token."""
    pair = Pair(MIXTRAL, tmp_path, fp8=DELAYED).written()
    one, shared = (
        run_first_step(pool, parallel, pair, settings(micro_batch=samples), tmp_path / str(samples)) for parallel, samples in ((ONE, 8), (EP2, 4))
    )
    claim = "delayed FP8 emulated, experts"
    assert measured(f"{claim}: loss against one process", "ep2", abs(shared.kl / one.kl - 1)) <= 1e-6  # fp32: another order of sums
    assert measured(f"{claim}: gradients against one process", "ep2", worst_difference(shared.gradients, one.gradients)[0]) <= 1e-5


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_passes_change_no_bit_while_several_are_under_way(step_of: FirstSteps, identical: Identical, recompute: str) -> None:
    """Delayed scaling on two stages: scales move between a pass and its second run."""
    kept, again = step_of("delayed", "pp2", 2), step_of("delayed", "pp2", 2, recompute)
    same = all(torch.equal(again.gradients[name], gradient) for name, gradient in kept.gradients.items())
    assert identical("delayed FP8 emulated: gradients, recomputed or kept", f"pp2, {recompute}", same and again.kl == kept.kl)


class LinearSeen(NamedTuple):
    """One tensor rank's part of a column- and a row-parallel linear and what they made."""

    input: Tensor
    weight: Tensor
    output: Tensor
    gradient: Tensor
    of_input: Tensor
    of_weight: Tensor


def run_linears(world: World) -> list[LinearSeen]:
    """fc1 and fc2 of a layer under tensorwise scaling with a sequence that is shared."""
    layout = global_layout(TP2_SP, world)
    fp8 = Fp8(student="tensorwise", emulated=True).of_student
    model = build_model(LLAMA, layout, world.platform, torch.float32, trainable=True, fp8=fp8)
    generator = torch.Generator().manual_seed(world.rank)
    mlp, found = next(model.layers()).mlp, []
    for linear in (mlp.linear_fc1, mlp.linear_fc2):
        linear.weight.data.copy_((1 + world.rank) * torch.randn(linear.weight.shape, generator=generator))
        own = torch.randn(4 if linear is mlp.linear_fc1 else 8, 1, linear.weight.shape[1], generator=generator) * (1 + 3 * world.rank)
        input_sBI = own.requires_grad_()
        output = linear(input_sBI)[0]
        gradient = torch.randn(output.shape, generator=generator) * (2 + world.rank)
        output.backward(gradient)
        seen = (input_sBI.detach(), linear.weight.detach(), output.detach(), gradient, input_sBI.grad, linear.weight.grad)
        found.append(LinearSeen(*(tensor.squeeze(1) for tensor in seen)))
    return found


def current(x: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> Tensor:
    """Rounded with the scale of its own or a given largest value."""
    return rounded(x, scale_of(amax_of(x) if amax is None else amax, dtype), dtype)


def test_tensorwise_scales_are_shared_where_a_sequence_is_and_nowhere_else(pool: Pool) -> None:
    """By hand from both ranks' parts: a column-parallel linear's input has one scale, and a row-parallel linear's gradient; shards of weights and
    of features have their own."""
    ranks = pool.run(run_linears, processes=2)
    column, row = zip(*ranks, strict=True)
    x = torch.cat([seen.input for seen in column])
    whole = current(x, E4M3)
    of_input = torch.zeros_like(x)
    for seen in column:
        gradient = current(seen.gradient, E5M2)
        torch.testing.assert_close(seen.output, whole @ current(seen.weight, E4M3).T)
        torch.testing.assert_close(seen.of_weight, gradient.T @ whole)
        of_input += gradient @ current(seen.weight, E4M3)
    torch.testing.assert_close(torch.cat([seen.of_input for seen in column]), of_input)
    output = sum(current(seen.input, E4M3) @ current(seen.weight, E4M3).T for seen in row)
    torch.testing.assert_close(torch.cat([seen.output for seen in row]), output)
    gradient = current(torch.cat([seen.gradient for seen in row]), E5M2)
    for seen in row:
        torch.testing.assert_close(seen.of_input, gradient @ current(seen.weight, E4M3))
        torch.testing.assert_close(seen.of_weight, gradient.T @ current(seen.input, E4M3))


def kinds_of_linears(world: World, parallel: Parallel, fp8: ModelFp8, arch: Any) -> dict[str, bool]:
    """Name of every module with a weight of two dimensions → whether it is emulated; the first whole layer number counts from 0."""
    layout = global_layout(parallel, world)
    model = build_model(arch, layout, world.platform, torch.float32, trainable=True, fp8=fp8)
    named = [(f"{layer.layer_number - 1}.{name}", module) for layer in model.layers() for name, module in layer.named_modules()]
    named += [(name, module) for chunk in model.chunks for name, module in chunk.named_modules() if not name.startswith("decoder.layers")]
    weights = {name: getattr(module, "weight", None) for name, module in named}
    return {name: isinstance(module, EmulatedLinear) for name, module in named if weights[name] is not None and weights[name].dim() == 2}


def test_linears_of_layers_are_emulated_but_for_the_first_and_last_layer_where_they_are_asked_to_stay(pool: Pool) -> None:
    fp8 = Fp8(student="blockwise", first_last_layers_bf16=True, emulated=True).of_student
    found: dict[str, bool] = {}
    for names in pool.run(kinds_of_linears, PP2, fp8, LLAMA, processes=2):
        found |= names
    linears = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    expected = {f"{layer}.{linear}": 0 < layer < LLAMA.layers - 1 for layer in range(LLAMA.layers) for linear in linears}
    assert found == {**expected, "embedding.word_embeddings": False, "output_layer": False}


def test_experts_are_emulated_and_their_router_is_not(pool: Pool) -> None:
    [found] = pool.run(kinds_of_linears, ONE, Fp8(student="tensorwise", emulated=True).of_student, MIXTRAL, processes=1)
    assert {name.rpartition(".")[2]: emulated for name, emulated in found.items() if name.startswith("0.mlp")} == {
        "router": False,
        "linear_fc1": True,
        "linear_fc2": True,
    }
    assert sum(found.values()) == MIXTRAL.layers * (2 + 2 * MIXTRAL.experts)


def frozen_states(world: World, folder: Path, other: Path, arch: Any) -> list[Tensor]:
    """Of a teacher whose weights are rounded as they are loaded, of one that rounds at every pass, and of both with other weights in them."""
    layout, found = global_layout(ONE, world), []
    for weights in (True, False):
        model = build_model(
            arch, layout, world.platform, torch.float32, output_layer=None, fp8=ModelFp8("tensorwise", weights=weights, emulated=True)
        )
        for source in (folder, other):
            load_model(model, source)
            found += forward_only(model, [collate(RandomSamples(2), (0, 1))], consume=lambda states, _: states.clone())
        found.append(next(model.layers()).mlp.linear_fc1.weight.clone())
    return found


def test_a_frozen_teachers_weights_are_rounded_once_as_they_are_loaded_and_anew_where_others_come(pool: Pool, pair: Pair, tmp_path: Path) -> None:
    write_random(tmp_path / "other", pair.teacher, seed=7, scale=0.2)
    [found] = pool.run(frozen_states, pair.folder / "teacher", tmp_path / "other", pair.teacher, processes=1)
    first, second, eight_bits, plain_first, plain_second, kept = found
    assert torch.equal(first, plain_first)
    assert torch.equal(second, plain_second)
    assert not torch.equal(first, second)
    assert torch.equal(eight_bits, current(kept, E4M3))


@pytest.fixture(scope="module")
def runs(pool: Pool, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Seen]]:
    """runs(job): what every process saw."""

    def run(job: Job) -> list[Seen]:
        return pool.run(train, job, processes=job.parallel.processes)

    return run


def job_of(pair: Pair, folder: Path, parallel: Parallel = ONE, fp8: Fp8 = DELAYED, **changes: Any) -> Job:
    return Job(pair.student, pair.folder, folder, parallel, **{"until": END, "fp8": fp8, **changes})


def scales_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what delayed scaling has put into a checkpoint."""
    return {name: tuple(entry.size) for name, entry in TorchDistReader(folder).tensors.items() if name.startswith("fp8.")}


@pytest.mark.parametrize(("parallel", "dtype"), [(PP2, torch.float32), (TP2_SP, torch.bfloat16)], ids=name_of)
def test_a_continued_run_is_the_undisturbed_one_to_the_bit_with_scales_that_follow_from_earlier_steps(
    runs: Callable[..., list[Seen]], pair: Pair, identical: Identical, tmp_path: Path, parallel: Parallel, dtype: torch.dtype
) -> None:
    fp8 = Fp8(teacher="blockwise", student="delayed", weights=True, amax_history=3, emulated=True)
    whole = job_of(pair, tmp_path / "whole", parallel, fp8, save_at=(STOP,), dtype=dtype)
    expected = runs(whole)
    shutil.copytree(whole.folder / "training", tmp_path / "again" / "training")
    found = runs(replace(whole, folder=tmp_path / "again", save_at=()))
    assert list(found[-1].losses) == list(range(STOP, END))
    same = all(found[-1].losses[step] == expected[-1].losses[step] for step in range(STOP, END))
    weights, again = (assembled(pair.student, [seen.weights for seen in run]) for run in (expected, found))
    same = same and all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert identical("delayed FP8 emulated: a continued run", f"{layout_name(parallel)}, {dtype}", same)


def loaded_scales(world: World, pair: Pair, folder: Path) -> dict[str, Tensor]:
    """Of one process's model, from a checkpoint of any layout."""
    model = build_model(pair.student, global_layout(ONE, world), world.platform, torch.float32, trainable=True, fp8=DELAYED.of_student)
    load_scaling(model, folder)
    return {name: tensor.clone() for name, tensor in scaling_state(model).items()}


def test_a_checkpoint_has_one_copy_of_the_scales_whatever_the_layout_and_another_layout_goes_on_from_it(
    pool: Pool, runs: Callable[..., list[Seen]], pair: Pair, tmp_path: Path
) -> None:
    """One history and its scales for the two forward tensors and for the gradient of each of a layer's four linears."""
    wholes = {}
    for name, parallel in (("tp2_sp", TP2_SP), ("one", ONE)):
        wholes[name] = job_of(pair, tmp_path / name, parallel, save_at=(STOP,))
        runs(wholes[name])
    held = {name: scales_in(job.folder / "training" / f"step_{STOP:08d}") for name, job in wholes.items()}
    assert held["tp2_sp"] == held["one"]
    assert len(held["one"]) == LLAMA.layers * 4 * 4
    assert held["one"]["fp8.layers.4.mlp.linear_fc2.scaling.ahead.amax"] == (3, 2)
    written = [wholes[name].folder / "training" / f"step_{STOP:08d}" for name in ("one", "tp2_sp")]
    one, cut = (pool.run(loaded_scales, pair, folder, processes=1)[0] for folder in written)
    assert all(bool((scale != 1).all()) for name, scale in one.items() if name.endswith("scale"))
    assert worst_difference(cut, one)[0] <= 5e-2
    shutil.copytree(tmp_path / "tp2_sp" / "training", tmp_path / "on" / "training")
    found = runs(replace(wholes["one"], folder=tmp_path / "on", save_at=()))[-1]
    again = runs(replace(wholes["one"], save_at=()))[-1]
    assert found.losses.keys() == {STOP, STOP + 1}
    # two steps behind fp32 sums of another order: a rounding that flips is a sixteenth of one weight or input
    assert relative_difference(torch.tensor(list(found.losses.values())), torch.tensor(list(again.losses.values()))) <= 1e-3


def test_a_recipe_distils_in_emulated_fp8_and_publishes_weights_without_any_scales(pool: Pool, house: Path, tmp_path: Path) -> None:
    recipe = recipe_for(copy_of(house, tmp_path / "fp32"), steps=4, validation_samples=2)
    fp8 = Fp8(teacher="tensorwise", student="delayed", emulated=True)
    results = {}
    for name, changed in (("fp32", recipe), ("fp8", recipe.model_copy(update={"fp8": fp8, "runs": str(copy_of(house, tmp_path / "fp8"))}))):
        pool.run(publish_stage, "distill", changed, processes=1)
        artifact = find_artifact(Path(changed.runs) / "tiny", "distill")
        assert artifact is not None
        results[name] = artifact.result["validation"]["forward_kl"]
        assert not [tensor for tensor in TorchDistReader(artifact.path / "checkpoint").tensors if "fp8" in tensor or "scal" in tensor]
    assert results["fp8"] != results["fp32"]
    assert abs(results["fp8"] / results["fp32"] - 1) < 0.1  # a tiny model of random weights after four steps


def scales_behind_a_step(world: World, parallel: Parallel, pair: Pair, micro_batch: int) -> dict[str, Tensor]:
    """What delayed scaling remembers after one pass forward and back."""
    distill = settings(micro_batch=micro_batch)
    teacher, student = load_pair(world, parallel, pair, distill)
    accumulate(teacher, student, distill)
    return {name: tensor.clone() for name, tensor in scaling_state(student.model).items()}


@pytest.mark.parametrize(("parallel", "micro_batch", "tolerance"), [(DP2, 4, 1e-5), (CP2, 8, 1e-2)], ids=["dp2", "cp2"])
def test_data_and_context_ranks_share_the_largest_values_of_a_pass(
    pool: Pool, pair: Pair, parallel: Parallel, micro_batch: int, tolerance: float
) -> None:
    """Two ranks of four samples each, or of half of the tokens of eight, know what one process of eight knows, and scales that follow from it.

    fp32: another order of sums; attention over context ranks has another one too, behind which a rounding may flip.
    """
    delayed = replace(pair, fp8=DELAYED)
    [one] = pool.run(scales_behind_a_step, ONE, delayed, 8, processes=1)
    for found in pool.run(scales_behind_a_step, parallel, delayed, micro_batch, processes=2):
        assert found.keys() == one.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=0, msg=name)
    amax, scale = (one[f"fp8.layers.0.mlp.linear_fc1.scaling.{history}"] for history in ("ahead.amax", "ahead.scale"))
    torch.testing.assert_close(448 / amax[-1], scale)
    assert bool((amax[-1] > 0).all())
    assert not amax[:-1].any()
