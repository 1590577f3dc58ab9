"""Hidden-state and embedding losses: every layout against a plain fp64 computation, the teacher's states handed to each stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from minitron_megatron.checkpoint.sharded import load_model, model_state, save_state
from minitron_megatron.config.schema import HiddenLoss, Parallel
from minitron_megatron.data.batches import Batch, collate, step_sample_ids
from minitron_megatron.distill.hidden_loss import HiddenLosses
from minitron_megatron.distill.hidden_map import StateName, Term, hidden_terms, projection_holders
from minitron_megatron.distill.hidden_states import StateCapture
from minitron_megatron.distill.kd_loss import LossSettings, TeacherTarget
from minitron_megatron.distill.output_layer import DistillationOutputLayer
from minitron_megatron.distill.projection import (
    add_projections,
    shared_projection_group,
    sum_shared_projection_grads,
    without_projections,
)
from minitron_megatron.model.gpt import HiddenStateGPT, build_model
from minitron_megatron.model.run import forward_backward, forward_only
from minitron_megatron.parallel.layout import Layout, global_layout
from minitron_megatron.parallel.split import split_layers
from minitron_megatron.parallel.world import World

from .conftest import Record
from .plain_model import PlainModel, kd_loss
from .pool import Pool
from .tiny import (
    DP2,
    LLAMA,
    ONE,
    PP2,
    TP2,
    TP2_PP2,
    TP2_SP,
    RandomSamples,
    layout_name,
    read_all,
    relative_difference,
    teacher_of,
    worst_difference,
    write_random,
)

# a projection larger than the weight that lies next to it in the first stage's gradients: there a shard's cut would go through it
STUDENT, TEACHER = LLAMA, teacher_of(LLAMA).resized(hidden=48)
GLOBAL_BATCH, MICRO_BATCH, ALPHA = 8, 2, 0.37
# layers 1 and 4 of 5: on two stages, whatever the split; the teacher's layer 2 serves two of the student's
PAIRS = [(2, 1), (2, 3), (5, 4)]
DP2_PP2 = Parallel(pipeline=2, data=2)


@dataclass(frozen=True)
class Case:
    """What one run compares, and how the machinery runs it."""

    hidden: HiddenLoss
    recompute: str | None = None
    """None, "full" or "norm"."""
    distributed_optimizer: bool = False


def case(recompute: str | None = None, distributed_optimizer: bool = False, **hidden: Any) -> Case:
    return Case(HiddenLoss(**{"pairs": PAIRS, "embeddings": True, "weight": ALPHA, **hidden}), recompute, distributed_optimizer)


def token_weights() -> Tensor:
    """[samples, S] zeros, ones and fractions, unevenly over samples and over the halves of a sequence."""
    weights = torch.rand(GLOBAL_BATCH, 16, generator=torch.Generator().manual_seed(7)) * 1.6
    return torch.where(weights > 1, 1.0, torch.where(weights < 0.4, 0.0, weights))


def random_projection(name: str) -> Tensor:
    """[E, D] a generic point: at the initial weight a mistake in the student's channels could hide."""
    generator = torch.Generator().manual_seed(len(name) + sum(name.encode()))
    return 0.2 * torch.randn(TEACHER.hidden, STUDENT.hidden, generator=generator)


class Given(NamedTuple):
    """The fp64 teacher's answer to all samples, rounded to fp32."""

    states: dict[StateName, Tensor]
    """[samples, S, E]"""
    hidden: Tensor
    weight: Tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("hidden")
    write_random(found / "student", STUDENT, seed=2, scale=0.2)
    write_random(found / "teacher", TEACHER, seed=1, scale=0.2)
    with torch.no_grad():
        teacher = PlainModel(found / "teacher", TEACHER)
        hidden = teacher.hidden(RandomSamples(GLOBAL_BATCH).tokens[:, :-1])
        wanted = {name: teacher.states[name].float() for term in terms_of(case().hidden) for name in [term.teacher]}
        torch.save(Given(wanted, hidden.float(), teacher.weights["output_layer.weight"].float())._asdict(), found / "given.pt")
    return found


def terms_of(hidden: HiddenLoss) -> list[Term]:
    return hidden_terms(hidden, hidden.pairs)  # type: ignore[arg-type]


# --- the plain computation ---------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Sums over all tokens, the gradient norm, gradients per token."""

    kl: float
    hidden: list[float]
    norm: float
    gradients: dict[str, Tensor]
    projections: dict[str, Tensor]


def plain_step(folder: Path, hidden: HiddenLoss) -> Step:
    """All samples at once, whole matrices, fp64, autograd."""
    student, teacher = PlainModel(folder / "student", STUDENT), PlainModel(folder / "teacher", TEACHER)
    tokens, weights = RandomSamples(GLOBAL_BATCH).tokens[:, :-1], token_weights().double()
    terms = terms_of(hidden)
    projections = {term.projection: random_projection(term.projection).double().requires_grad_() for term in terms}
    kl = kd_loss(student, teacher, tokens, weights)
    sums = []
    for term in terms:
        ours, theirs = student.states[term.student] @ projections[term.projection].T, teacher.states[term.teacher].detach()
        cosine = (ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
        token_losses = 1 - cosine if hidden.kind == "cosine" else (ours - theirs).pow(2).sum(-1) / TEACHER.hidden
        sums.append((token_losses * weights).sum())
    count = (weights > 0).sum()
    ((kl + ALPHA * torch.stack(sums).sum()) / count).backward()
    gradients = {name: weight.grad for name, weight in student.weights.items() if weight.grad is not None}
    of_projections = {name: weight.grad for name, weight in projections.items() if weight.grad is not None}
    norm = torch.stack([gradient.square().sum() for gradient in (*gradients.values(), *of_projections.values())]).sum().sqrt()
    return Step(kl.item(), [item.item() for item in sums], norm.item(), gradients, of_projections)


# --- the same on megatron, in workers ----------------------------------------------------------------------------------------------------


class Harness:
    """A student with its hidden losses, and the given teacher's states."""

    def __init__(self, world: World, parallel: Parallel, folder: Path, wanted: Case) -> None:
        self.layout, self.case = global_layout(parallel, world), wanted
        self.terms = terms_of(wanted.hidden)
        self.given = Given(**torch.load(folder / "given.pt"))
        self.model = build_model(STUDENT, self.layout, world.platform, torch.float32, output_layer=DistillationOutputLayer, trainable=True)
        load_model(self.model, folder / "student")
        stages = split_layers(STUDENT, self.layout.pipeline, self.layout.split_rule)
        self.holders = projection_holders(self.terms, stages)
        add_projections(self.model, self.terms, layers_per_chunk=stages, number=self.layout.stage, teacher_hidden=TEACHER.hidden)
        for name, projection in self.projections().items():
            projection.weight.data.copy_(random_projection(name))
        self.group = shared_projection_group(self.holders.get("shared", []), self.layout.groups.pp)
        set_recompute(self.model, wanted.recompute)
        self.losses = HiddenLosses(self.model, self.terms, wanted.hidden.kind, lambda: torch.tensor(ALPHA))
        self.wrapped, self.optimizer = wrap(self.model.train(), wanted.distributed_optimizer)
        self.model.config.finalize_model_grads_func = self.finalize

    def projections(self) -> dict[str, Any]:
        return dict(getattr(self.model, "distillation_projections", {}).items())

    def finalize(self, chunks: list[Any], num_tokens: Tensor | None = None, pg_collection: Any = None, **options: Any) -> None:
        finalize_model_grads(chunks, num_tokens, pg_collection, **options)
        sum_shared_projection_grads(chunks, self.group)

    def batches(self) -> list[Batch]:
        samples, weights = RandomSamples(GLOBAL_BATCH), token_weights()
        groups = step_sample_ids(0, global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, data_rank=self.layout.data_rank, data_size=self.layout.data)
        return [dataclasses.replace(collate(samples, ids), loss_mask_BS=weights[ids]) for ids in groups]

    def expect(self, batch: Batch) -> None:
        def of(name: StateName) -> Tensor:
            states_SBE = self.given.states[name][batch.sample_ids_B].transpose(0, 1)
            return states_SBE.chunk(self.layout.tensor)[self.layout.tensor_rank] if self.layout.sequence_parallel else states_SBE

        self.losses.expect({name: of(name) for name in self.losses.teacher_states}, batch.loss_mask_BS)

    def loss(self, hidden_SBD: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rows = self.model.vocab_size // self.layout.tensor
        padded = torch.zeros(self.model.vocab_size, TEACHER.hidden)
        padded[: STUDENT.vocab] = self.given.weight
        target = TeacherTarget(
            hidden_NE=self.given.hidden[batch.sample_ids_B].transpose(0, 1).flatten(0, 1),
            weight_vE=padded[self.model.first_row() :][:rows],
            labels_N=batch.labels_BS.t().flatten(),
            token_weights_N=batch.loss_mask_BS.t().flatten(),
        )
        settings = LossSettings(forward_kl=1.0, cross_entropy=0.0, temperature=1.0, chunk_tokens=7)
        total, kl, _ = self.model.output_layer(hidden_SBD, None, target=target, settings=settings, rows=self.model.valid_rows())
        return total, (batch.loss_mask_BS > 0).sum().int(), {"kl": kl}

    def gradients(self) -> dict[str, Tensor]:
        """By name; after a reduce-scatter the ranks' shards are put together first."""
        if self.case.distributed_optimizer:
            for buffer in self.wrapped.buffers:
                for bucket in buffer.buckets:
                    own = bucket.grad_data.chunk(self.layout.data)[self.layout.data_rank].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, own, group=self.layout.groups.dp)
        return {name: parameter.main_grad.clone() for name, parameter in self.model.named_parameters()}


def set_recompute(model: HiddenStateGPT, recompute: str | None) -> None:
    if recompute == "full":
        model.config.recompute_granularity, model.config.recompute_method, model.config.recompute_num_layers = "full", "uniform", 1
    for layer in model.decoder.layers if recompute == "norm" else ():
        layer.recompute_input_layernorm = True


def without_fp8() -> Any:
    """By default this class of megatron-core asks Transformer Engine about fp8, which CPUs lack."""
    return mock.patch.object(tensor_parallel, "CheckpointWithoutOutput", partial(tensor_parallel.CheckpointWithoutOutput, fp8=None))


def wrap(model: HiddenStateGPT, distributed: bool) -> tuple[DistributedDataParallel, Any]:
    overlaps = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 1500}
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **(overlaps if distributed else {}))
    wrapped = DistributedDataParallel(model.config, settings, model, pg_collection=model.layout.groups)
    if distributed:
        model.config.no_sync_func = wrapped.no_sync
    config = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=distributed, overlap_param_gather=distributed)
    return wrapped, get_megatron_optimizer(config, [wrapped])


class Answer(NamedTuple):
    """What one process saw."""

    kl: float
    hidden: list[float]
    norm: float
    projections: dict[str, Tensor]


def megatron_step(world: World, parallel: Parallel, folder: Path, wanted: Case, written: Path) -> Answer:
    harness = Harness(world, parallel, folder, wanted)
    harness.wrapped.zero_grad_buffer()
    with harness.losses.training(), without_fp8():
        logged = forward_backward(harness.model, harness.wrapped, harness.batches(), harness.loss, before=harness.expect)
    harness.optimizer.prepare_grads()
    norm = float(harness.optimizer.get_grad_norm())
    gradients = harness.gradients()
    with torch.no_grad():
        for name, parameter in harness.model.named_parameters():
            parameter.copy_(gradients[name])
    write(without_projections(model_state(harness.model)), written, world)
    own = {name.split(".")[1]: gradient for name, gradient in gradients.items() if name.startswith("distillation_projections")}
    return Answer(total_kl(harness.layout, logged), total_hidden(harness.losses), norm, own)


def train_two_steps(world: World, parallel: Parallel, folder: Path) -> tuple[Tensor, bool]:
    """This stage's copy of the shared projection after two steps with every overlap, and whether nothing is left in the norms' queues."""
    harness = Harness(world, parallel, folder, case(distributed_optimizer=True))
    for _ in range(2):
        harness.wrapped.zero_grad_buffer()
        harness.optimizer.zero_grad()
        with harness.losses.training():
            forward_backward(harness.model, harness.wrapped, harness.batches(), harness.loss, before=harness.expect)
        harness.optimizer.step()
    harness.wrapped.start_param_sync(force_sync=True)
    return harness.projections()["shared"].weight.detach().clone(), not any(harness.losses._queues.values())


def total_kl(layout: Layout, logged: list[dict[str, Tensor]]) -> float:
    total = torch.zeros((), dtype=torch.float64)
    for item in logged if layout.tensor_rank == 0 else ():
        total += item["kl"].double()
    dist.all_reduce(total)
    return total.item()


def total_hidden(losses: HiddenLosses) -> list[float]:
    """As the loop does it: the sum over all processes, no questions asked."""
    sums = losses.take_sums()
    dist.all_reduce(sums)
    return sums.tolist()


def write(state: dict[str, Any], folder: Path, world: World) -> None:
    if world.is_main:
        folder.mkdir()
    world.barrier()
    save_state(state, folder)


def run_step(pool: Pool, parallel: Parallel, folder: Path, wanted: Case, written: Path) -> tuple[Step, list[Answer]]:
    answers = pool.run(megatron_step, parallel, folder, wanted, written, processes=parallel.processes)
    projections = {name: gradient for answer in answers for name, gradient in answer.projections.items()}
    return Step(answers[0].kl, answers[0].hidden, answers[0].norm, read_all(written, STUDENT), projections), answers


def check(found: Step, reference: Step, record: Record, layout: str) -> None:
    losses = max(relative_difference(found.kl, reference.kl), relative_difference(found.hidden, reference.hidden))
    gradient, name = worst_difference(found.gradients, reference.gradients)
    of_projection, projection = worst_difference(found.projections, reference.projections)
    assert record("hidden losses, plain fp64: losses", layout, losses) <= 1e-6  # fp32 sums in another order
    assert record("hidden losses, plain fp64: gradients", layout, gradient) <= 1e-5, name
    assert record("hidden losses, plain fp64: projection", layout, of_projection) <= 1e-5, projection
    assert record("hidden losses, plain fp64: norm", layout, relative_difference(found.norm, reference.norm)) <= 1e-6


RUNS = {
    "one": (ONE, case()),
    "tp2": (TP2, case()),
    "tp2_sp": (TP2_SP, case()),
    "pp2": (PP2, case()),
    "tp2_pp2_sp": (TP2_PP2, case()),
    "dp2_distributed_optimizer": (DP2, case(distributed_optimizer=True)),
    "pp2_dp2_distributed_optimizer": (DP2_PP2, case(distributed_optimizer=True)),
    "tp2_sp_mse_per_pair": (TP2_SP, case(kind="mse", projection="per_pair")),
    "pp2_mse": (PP2, case(kind="mse")),
    "pp2_full_recompute": (PP2, case(recompute="full")),
    "tp2_pp2_sp_per_pair_norm_recompute": (TP2_PP2, case(recompute="norm", projection="per_pair")),
}


SLOW = ("pp2_mse", "dp2_distributed_optimizer")  # each has a near relation in the others


@pytest.mark.parametrize("run", [pytest.param(run, marks=[pytest.mark.slow] if run in SLOW else []) for run in RUNS])
def test_hidden_losses_and_every_gradient_equal_a_plain_computation(pool: Pool, measured: Record, folder: Path, tmp_path: Path, run: str) -> None:
    parallel, wanted = RUNS[run]
    found, answers = run_step(pool, parallel, folder, wanted, tmp_path / "gradients")
    check(found, plain_step(folder, wanted.hidden), measured, run)
    assert all(answer.projections for answer in answers)  # every stage compares something
    for answer in answers:  # every copy of a projection steps by the same gradient, or the copies would part
        for name, gradient in answer.projections.items():
            assert torch.equal(gradient, found.projections[name])


def test_copies_of_a_shared_projection_stay_equal_to_the_bit_over_stages_and_data_ranks(pool: Pool, folder: Path) -> None:
    """Each data-parallel rank steps its shard and gathers the others': other shards on another stage, and the copies part."""
    (first, _), *others = pool.run(train_two_steps, DP2_PP2, folder, processes=4)
    # Adam's first steps move every weight that has a gradient by about the learning rate, 1e-3
    assert 1e-3 < (first - random_projection("shared")).abs().median() < 3e-3
    assert all(torch.equal(first, other) and empty for other, empty in others)


def measure(world: World, parallel: Parallel, folder: Path) -> tuple[list[float], bool]:
    """The losses of a forward-only pass by a student that recomputes, and whether anything is left behind by one without hidden losses."""
    harness = Harness(world, parallel, folder, case(recompute="full"))
    with harness.losses.measuring():
        forward_only(harness.model, harness.batches(), before=harness.expect)
    sums = total_hidden(harness.losses)
    forward_only(harness.model, harness.batches(), before=harness.expect)  # a validation
    return sums, any(harness.losses._queues.values()) or bool(harness.losses.take_sums().any())


@pytest.mark.parametrize("parallel", [ONE, TP2_PP2], ids=layout_name)
def test_a_forward_only_pass_measures_the_same_losses_and_a_validation_leaves_nothing(pool: Pool, folder: Path, parallel: Parallel) -> None:
    answers = pool.run(measure, parallel, folder, processes=parallel.processes)
    assert relative_difference(answers[0][0], plain_step(folder, case().hidden).hidden) <= 1e-6  # fp32 against fp64
    assert not any(left for _, left in answers)


def capture(world: World, parallel: Parallel, folder: Path) -> dict[StateName, Tensor]:
    """Two micro-batches through a megatron teacher; the states of the second one that arise here, [S, B, E]."""
    layout = global_layout(parallel, world)
    teacher = build_model(TEACHER, layout, world.platform, torch.float32)
    load_model(teacher, folder / "teacher")
    captured = StateCapture([teacher], [("layer", 0), ("layer", 5), ("embedding",)])
    tokens = RandomSamples(GLOBAL_BATCH)
    found = []
    for ids in ([0, 1], [2, 3]):
        forward_only(teacher, [collate(tokens, ids)])
        found.append(captured.take())
    captured.remove()
    forward_only(teacher, [collate(tokens, [0, 1])])
    assert not captured.take()
    return found[1]


@pytest.mark.parametrize("parallel", [ONE, TP2_PP2], ids=layout_name)
def test_captured_states_are_those_of_a_plain_model_on_the_stage_where_they_arise(pool: Pool, folder: Path, parallel: Parallel) -> None:
    plain = PlainModel(folder / "teacher", TEACHER)
    plain.hidden(RandomSamples(GLOBAL_BATCH).tokens[2:4, :-1])
    answers = pool.run(capture, parallel, folder, processes=parallel.processes)
    for name in (("layer", 0), ("layer", 5), ("embedding",)):
        parts = [answer[name] for answer in answers if name in answer]
        assert len(parts) == parallel.tensor  # on one stage, a part of S from each tensor rank
        assert relative_difference(torch.cat(parts), plain.states[name].detach().transpose(0, 1)) <= 1e-5  # one element, after five layers in fp32


def train_and_save(world: World, parallel: Parallel, folder: Path, written: Path) -> Tensor:
    """Weights and optimizer after a step, as the training checkpoint has them, and what would be published; returns the projection."""
    harness = Harness(world, parallel, folder, case())
    with harness.losses.training():
        forward_backward(harness.model, harness.wrapped, harness.batches(), harness.loss, before=harness.expect)
    harness.optimizer.step()
    state = model_state(harness.model)
    write({"model": state, "optimizer": harness.optimizer.sharded_state_dict(state)}, written / "training", world)
    write(without_projections(model_state(harness.model)), written / "published", world)
    return harness.projections()["shared"].weight.detach().clone()


def load_training_state(world: World, parallel: Parallel, folder: Path, written: Path) -> tuple[Tensor, Tensor]:
    """The projection and Adam's first moment of it."""
    harness = Harness(world, parallel, folder, case())
    model = model_state(harness.model)
    wanted = {"model": model, "optimizer": harness.optimizer.sharded_state_dict(model, is_loading=True)}
    state = dist_checkpointing.load(wanted, str(written / "training"))
    harness.model.load_state_dict(state["model"])
    harness.optimizer.load_state_dict(state["optimizer"])
    weight = harness.projections()["shared"].weight
    [adam] = getattr(harness.optimizer, "chained_optimizers", [harness.optimizer])
    return weight.detach().clone(), adam.optimizer.state[weight]["exp_avg"].clone()


def test_a_checkpoint_holds_the_shared_projection_once_for_every_layout_and_what_is_published_lacks_it(
    pool: Pool, folder: Path, tmp_path: Path
) -> None:
    saved = pool.run(train_and_save, TP2_PP2, folder, tmp_path, processes=4)
    training, published = (set(dist_checkpointing.load_tensors_metadata(str(tmp_path / name))) for name in ("training", "published"))
    weights = {key for key in training if not key.startswith("optimizer.")}
    assert weights - published == {"distillation_projections.shared.weight"}
    moments = []
    for parallel in (ONE, PP2):
        for weight, moment in pool.run(load_training_state, parallel, folder, tmp_path, processes=parallel.processes):
            assert torch.equal(weight, saved[0])
            moments.append(moment)
    assert moments[0].abs().max() > 0 and all(torch.equal(moments[0], other) for other in moments)
