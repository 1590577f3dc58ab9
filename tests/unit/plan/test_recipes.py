"""Every recipe that comes with the project, planned as the command does it; and layouts that are tried."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from minitron_megatron.arch.architecture import parameter_count
from minitron_megatron.config.family import checked_steps, load_steps
from minitron_megatron.errors import PlatformError
from minitron_megatron.plan.case import Case
from minitron_megatron.plan.checkpoints import training_checkpoint_bytes
from minitron_megatron.plan.cluster import Cluster, read_cluster
from minitron_megatron.plan.gpus import ACCELERATORS, GIB
from minitron_megatron.plan.layouts import Choice, Found, all_layouts, choices, problems, with_choice
from minitron_megatron.plan.memory import training_memory, worst
from minitron_megatron.plan.stages import stage_plans, training_plan
from minitron_megatron.plan.tables import print_layouts, print_plan
from minitron_megatron.plan.time import training_time
from minitron_megatron.search.survey import surviving

CONFIGS = Path(__file__).parents[3] / "configs"
LLAMA = "llama31_8b_to_4b_width.yaml"
H100S = read_cluster(None)


def cases(name: str, *overrides: str, cluster: Cluster = H100S) -> list[Case]:
    """One for each step; the source's shape stands in for a model that is not there."""
    known = sorted((CONFIGS / "architectures").glob("*.json"))
    shape = next((file for file in known if "smollm2" in name and "smollm2" in file.name), None)
    given = [*overrides, *([f"model.hf_config={shape}"] if shape else [])]
    found = []
    for step, source, target in checked_steps(load_steps(CONFIGS / name, [*given, "model.path=nowhere"])):
        own = surviving(step.recipe, step.recipe.search, source).largest if step.recipe.search else target
        found.append(Case(step.recipe, source, own, cluster))
    return found


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_recipe_is_planned_and_those_for_a_node_fit_it(name: str) -> None:
    for case in cases(name):
        stages = stage_plans(case)
        console = Console(width=220, file=StringIO(), record=True)
        print_plan(case, stages, console)
        text = console.export_text()
        assert all(stage.name in text for stage in stages) and "does not fit" not in text
        by_name = {stage.name: stage for stage in stages}
        distill = by_name["distill"]
        assert distill.memory and distill.seconds and distill.tokens
        assert distill.tokens == case.recipe.distill.steps * case.recipe.distill.global_batch * case.recipe.distill.sequence_length


def test_the_weights_of_all_ranks_are_the_model() -> None:
    """Llama's vocabulary divides by four; norms lie whole on every tensor rank."""
    [case] = cases(LLAMA)
    plan = training_plan(case, "distill")
    norms = (2 * case.target.layers + 1) * case.target.hidden
    held = sum(weight.elements for chunk in plan.weights(0) for weight in chunk)
    assert 4 * held - 3 * norms == parameter_count(case.target)


def test_a_training_checkpoint_holds_sixteen_bytes_less_the_gradient_of_every_parameter() -> None:
    [case] = cases(LLAMA)
    assert training_checkpoint_bytes(case.target, 2) == 14 * parameter_count(case.target)


def test_more_replicas_share_the_optimizer_out_and_shards_the_rest() -> None:
    [small], [replicas], [shards] = (cases(LLAMA, *more) for more in ([], ["parallel.data=8"], ["parallel.tensor=8"]))
    optimizer = [training_memory(training_plan(case, "distill"), 0).parts["optimizer"] for case in (small, replicas)]
    assert optimizer[1] == pytest.approx(optimizer[0] / 4, rel=1e-3)
    totals = [worst([training_memory(training_plan(case, "distill"), 0)]).total for case in (small, shards)]
    assert totals[1] < 0.7 * totals[0]


def test_states_beyond_the_budget_wait_in_host_memory() -> None:
    [case] = cases(LLAMA, "distill.handover_device_gib=1")
    memory = training_memory(training_plan(case, "distill"), 0)
    assert memory.parts["teacher's states"] == GIB and memory.host > 0
    micro_batches, state = 1152 // 2, 8192 * 4096 * 2 // 4  # sequence parallel on four ranks
    assert memory.host + GIB == micro_batches * state


def test_without_a_gpu_there_is_memory_and_no_time() -> None:
    [case] = cases("smollm2_135m_to_97m.yaml", cluster=Cluster(None, 2))
    distill = next(stage for stage in stage_plans(case) if stage.name == "distill")
    assert distill.memory and distill.seconds is None and case.precision == "fp32"
    with pytest.raises(PlatformError, match="--layouts needs a GPU"):
        all_layouts(case)


@pytest.fixture(scope="module")
def few() -> Case:
    """One node."""
    cluster = Cluster(ACCELERATORS["H100-80GB"], 8, nodes=1)
    monkey = pytest.MonkeyPatch()
    monkey.chdir(CONFIGS.parent)
    [case] = cases(LLAMA, "distill.global_batch=64", cluster=cluster)
    monkey.undo()
    return case


@pytest.fixture(scope="module")
def tried(few: Case) -> Found:
    return all_layouts(few)


def test_every_layout_is_either_among_those_that_fit_or_refused_with_a_reason(few: Case, tried: Found) -> None:
    found = tried
    everything = list(choices(8, 8))
    assert found.processes == 8 and all(one.tensor <= 8 for one in everything)
    assert sorted([one.choice for one in found.fitting] + [one for refused in found.refused.values() for one in refused]) == sorted(everything)
    limit = few.memory_limit or 0
    assert found.fitting and all(one.memory.total <= limit for one in found.fitting)
    times = [one.step.total for one in found.fitting]
    assert times == sorted(times)
    assert any(reason.startswith("needs ") and "GiB a rank" in reason for reason in found.refused)
    console = Console(width=200, file=StringIO(), record=True)
    print_layouts(few, found, console)
    text = console.export_text()
    needs = [int(gib) for gib in re.findall(r"needs (\d+) to", text)]
    assert len(needs) > 2 and needs == sorted(needs)  # little before much
    assert "Refused" in text and f"parallel.tensor={found.fitting[0].choice.tensor}" in text


def test_no_step_is_planned_shorter_than_its_ideal(few: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 144 micro-batches eight and sixteen are simulated; here the second eight make good what the first ones waited."""
    monkeypatch.chdir(CONFIGS.parent)
    [case] = cases(LLAMA, cluster=few.cluster)
    own = with_choice(case, Choice(1, 2, 2, 8, 1, "none"))
    assert own.machine is not None and training_time(training_plan(own, "distill"), own.machine).waiting >= 0


def test_the_overrides_of_a_layout_are_a_recipe_with_the_same_plan(few: Case) -> None:
    choice = Choice(2, 2, 1, 2, 2, "selective")
    [told] = cases(LLAMA, "distill.global_batch=64", "correct=null", *choice.overrides(), cluster=few.cluster)
    assert worst_of(told) == worst_of(with_choice(few, choice))


def worst_of(case: Case) -> dict[str, int]:
    plan = training_plan(case, "distill")
    return worst([training_memory(plan, rank) for rank in range(plan.split.pipeline)]).parts


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (Choice(16, 1, 1, 1, 1, "none"), "does not divide the source model's 8 key/value groups"),
        (Choice(1, 16, 4, 1, 1, "none"), "is more than the source model's 32 layers"),
        (Choice(8, 1, 1, 2, 64, "none"), "is not divisible by micro_batch × parallel.data"),
        (Choice(1, 4, 2, 4, 8, "none"), "needs a multiple of parallel.pipeline=4 micro-batches"),
    ],
)
def test_a_layout_that_a_run_would_refuse_is_refused_in_its_words(few: Case, choice: Choice, told: str) -> None:
    assert told in "; ".join(problems(few, choice))


def test_a_smaller_gpu_fits_less(few: Case, tried: Found) -> None:
    gpu = replace(ACCELERATORS["H100-80GB"], memory_gib=30)
    smaller = all_layouts(replace(few, cluster=replace(few.cluster, gpu=gpu)))
    assert 0 < len(smaller.fitting) < len(tried.fitting)
