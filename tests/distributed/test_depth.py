"""Layers left out in memory against a plain fp64 model from which they are really removed; the same choice under every layout."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import find_artifact
from minitron_megatron.config.depth import Depth
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.samples import packed_samples
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.depth import stage as depth
from minitron_megatron.parallel.layout import destroy_layout
from minitron_megatron.parallel.world import World
from minitron_megatron.scores.influence import influence_of_blocks
from minitron_megatron.scores.statistics import Statistics

from .conftest import Record
from .house import SOURCE, TARGET, build_house, copy_of, inputs_of, publish_stage, recipe_for
from .plain_model import PlainModel
from .pool import Pool
from .tiny import DP2, EP2_PP2, MIXTRAL, ONE, PP2, PP2_VPP2, SEQUENCE, TP2_PP2, TP2_SP, layout_name, name_of, relative_difference, teacher_of

SAMPLES = 7
"""Uneven on two data-parallel ranks, and in micro-batches of 2."""
FP32 = 1e-6  # means over 7 × 16 tokens of fp32 values
RANKED = Depth(criterion="perplexity", removal="ranked", drop=2, samples=SAMPLES, sequence_length=SEQUENCE)
BLOCK = RANKED.model_copy(update={"removal": "block", "drop": 3, "micro_batch": 2})
GREEDY = Depth(criterion="logit_error", drop=3, samples=SAMPLES, sequence_length=SEQUENCE, micro_batch=2, first_protected=1)


def slow(*layouts: Parallel) -> list[Any]:
    return [pytest.param(layout, marks=pytest.mark.slow) for layout in layouts]


def recipe_with(runs: Path, settings: Depth, parallel: Parallel = ONE, **data: Any) -> Recipe:
    recipe = recipe_for(runs, parallel)
    return recipe.model_copy(update={"depth": settings, "data": recipe.data.model_copy(update=data)})


def run_depth(world: World, recipes: list[Recipe], folder: Path) -> None:
    for number, recipe in enumerate(recipes):
        part = folder / str(number)
        if world.is_main:
            part.mkdir(parents=True)
        world.barrier()
        depth.run(recipe, inputs_of(Path(recipe.runs), "import", "data", "importance"), part, world)
        destroy_layout()


def measure(pool: Pool, recipes: list[Recipe], folder: Path) -> list[dict[str, Any]]:
    """depth.json of each."""
    pool.run(run_depth, recipes, folder, processes=recipes[0].parallel.processes)
    return [json.loads((folder / str(number) / "depth.json").read_text()) for number in range(len(recipes))]


def removed(plain: PlainModel, layers: tuple[int, ...]) -> PlainModel:
    """A model that never had these layers: its weights are numbered anew."""
    kept = [layer for layer in range(plain.arch.layers) if layer not in layers]
    smaller = copy.copy(plain)
    smaller.arch, smaller.seen, smaller.states, smaller.weights = plain.arch.resized(layers=len(kept)), {}, {}, {}
    for name, weight in plain.weights.items():
        parts = name.split(".")
        if parts[:2] != ["decoder", "layers"]:
            smaller.weights[name] = weight
        elif int(parts[2]) in kept:
            smaller.weights[".".join([*parts[:2], str(kept.index(int(parts[2]))), *parts[3:]])] = weight
    return smaller


class Reference:
    """Whole logits of the plain model, with and without layers, on the stage's samples."""

    def __init__(self, house: Path, arch: Architecture, cache: Path) -> None:
        samples = packed_samples(house / "tiny" / "data" / "train", samples=SAMPLES, sequence_length=SEQUENCE, seed=1234, cache=cache, repeat=False)
        self.tokens = torch.stack([samples[sample] for sample in range(SAMPLES)])
        self.plain = PlainModel(house / "tiny" / "import" / "checkpoint", arch)
        self.full = self.logits(())

    def logits(self, layers: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            return removed(self.plain, layers).logits(self.tokens[:, :-1])

    def loss(self, layers: tuple[int, ...]) -> Tensor:
        """[samples] nats a token."""
        return -self.logits(layers).log_softmax(-1).gather(-1, self.tokens[:, 1:, None])[..., 0].mean(-1)

    def logit_error(self, layers: tuple[int, ...]) -> float:
        return float((self.logits(layers) - self.full).square().sum() / self.full.square().sum())


@pytest.fixture(scope="module")
def reference(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(house, SOURCE, tmp_path_factory.mktemp("order"))


def values_of(found: dict[str, Any], number: int = 0) -> dict[tuple[int, ...], float]:
    return {tuple(item["layers"]): item["value"] for item in found["rounds"][number]["candidates"]}


def lowest(values: dict[tuple[int, ...], float], count: int) -> list[int]:
    return [layer for layers in sorted(values, key=values.__getitem__)[:count] for layer in layers]


@pytest.fixture(scope="module")
def one_process(pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return measure(pool, [recipe_with(house, settings) for settings in (RANKED, BLOCK, GREEDY)], tmp_path_factory.mktemp("depth") / "one")


def test_the_loss_without_a_layer_or_a_block_is_that_of_a_model_that_never_had_it(
    one_process: list[dict[str, Any]], reference: Reference, measured: Record
) -> None:
    for found, candidates in ((one_process[0], [(layer,) for layer in range(6)]), (one_process[1], [(i, i + 1, i + 2) for i in range(4)])):
        values, losses = values_of(found), {layers: reference.loss(layers) for layers in candidates}
        assert list(values) == candidates
        worst = max(relative_difference(values[layers], loss_N.mean()) for layers, loss_N in losses.items())
        assert measured("LM loss without layers against plain fp64", "one", worst) <= FP32
        for item in found["rounds"][0]["candidates"]:
            loss_N = losses[tuple(item["layers"])]
            assert item["stderr"] == pytest.approx(float(loss_N.std() / SAMPLES**0.5), rel=1e-5)
        assert found["baseline"]["value"] == pytest.approx(float(reference.loss(()).mean()), rel=FP32)
        means = {layers: float(loss_N.mean()) for layers, loss_N in losses.items()}
        drop = 2 if len(candidates[0]) == 1 else 1
        assert found["order"] == lowest(means, drop) and found["dropped_layers"] == sorted(lowest(means, drop))


def test_the_margin_of_a_choice_is_held_against_the_error_of_the_samples_differences(one_process: list[dict[str, Any]], reference: Reference) -> None:
    choice = one_process[1]["rounds"][0]
    apart_N = reference.loss(tuple(choice["next"])) - reference.loss(tuple(choice["chosen"][0]))
    error = float(apart_N.std() / SAMPLES**0.5)
    assert choice["margin"] == pytest.approx(float(apart_N.mean()), rel=1e-4)  # a small difference of two losses
    assert choice["margin_stderr"] == pytest.approx(error, rel=1e-4)
    assert choice["is_noise"] == (float(apart_N.mean()) < 2 * error) == one_process[1]["is_noise"]


def test_greedy_removal_by_logit_error_is_that_of_brute_force_over_whole_logits(
    one_process: list[dict[str, Any]], reference: Reference, measured: Record
) -> None:
    gone: tuple[int, ...] = ()
    for number in range(3):
        expected = {(layer,): reference.logit_error(tuple(sorted((*gone, layer)))) for layer in range(1, 6) if layer not in gone}
        values = values_of(one_process[2], number)
        assert values.keys() == expected.keys()
        worst = max(relative_difference(values[layers], error) for layers, error in expected.items())
        assert measured("logit error without layers against plain fp64", "one", worst) <= 1e-5  # fp32 states against fp64
        assert one_process[2]["rounds"][number]["removed"] == list(gone)
        gone = (*gone, *lowest(expected, 1))
    assert one_process[2]["order"] == list(gone)


@pytest.mark.parametrize("parallel", [PP2_VPP2, TP2_PP2, *slow(DP2, PP2, TP2_SP, Parallel(pipeline=2, data=2))], ids=name_of)
def test_every_layout_measures_the_same_and_chooses_the_same(
    pool: Pool, house: Path, tmp_path: Path, one_process: list[dict[str, Any]], measured: Record, parallel: Parallel
) -> None:
    found = measure(pool, [recipe_with(house, settings, parallel) for settings in (RANKED, BLOCK, GREEDY)], tmp_path / "depth")
    for actual, expected in zip(found, one_process, strict=True):
        assert actual["order"] == expected["order"]
        for number in range(len(expected["rounds"])):
            ours, theirs = values_of(actual, number), values_of(expected, number)
            worst = max(relative_difference(ours[layers], value) for layers, value in theirs.items())
            assert measured(f"{expected['criterion']} without layers, as one process", layout_name(parallel), worst) <= FP32


@pytest.mark.parametrize("parallel", [EP2_PP2, *slow(ONE)], ids=name_of)
def test_layers_with_experts_are_left_out_too(pool: Pool, tmp_path: Path, measured: Record, parallel: Parallel) -> None:
    arch = teacher_of(MIXTRAL)
    build_house(tmp_path / "runs", arch)
    settings = RANKED.model_copy(update={"drop": 1, "samples": SAMPLES})
    (found,) = measure(pool, [recipe_with(tmp_path / "runs", settings, parallel)], tmp_path / "depth")
    reference, values = Reference(tmp_path / "runs", arch, tmp_path / "order"), values_of(found)
    worst = max(relative_difference(values[layer,], reference.loss((layer,)).mean()) for layer in range(arch.layers))
    assert measured("LM loss without a layer of experts against plain fp64", layout_name(parallel), worst) <= FP32


class Interrupted(Exception):
    """Stands for a job that ended."""


def publish_depth(world: World, recipe: Recipe, stop_behind: int | None = None) -> list[tuple[int, ...]]:
    """Publishes the stage; what was left out in each of this process's measurements. With stop_behind, dies ahead of the one that follows."""
    seen: list[tuple[int, ...]] = []
    real = depth.without_layers

    def watched(model: Any, layers: tuple[int, ...]) -> Any:
        if len(seen) == stop_behind:
            raise Interrupted
        seen.append(layers)
        return real(model, layers)

    depth.without_layers = watched
    try:
        publish_stage(world, "depth", recipe)
    except Interrupted:
        pass
    finally:
        depth.without_layers = real
    return seen


def test_an_interrupted_stage_measures_no_candidate_twice_and_pruning_drops_what_it_chose(
    pool: Pool, house: Path, tmp_path: Path, one_process: list[dict[str, Any]]
) -> None:
    """Greedy, so that what is left depends on what was found before; the second start is of another layout and finds half a line."""
    runs = copy_of(house, tmp_path / "runs")
    settings = GREEDY.model_copy(update={"drop": SOURCE.layers - TARGET.layers + 1})
    recipe = recipe_with(runs, settings)
    # the house's target drops one layer, this one two
    target = recipe.prune.target.model_copy(update={"layers": TARGET.layers - 1})
    recipe = recipe.model_copy(update={"prune": recipe.prune.model_copy(update={"target": target})})
    (first,) = pool.run(publish_depth, recipe, 6, processes=1)
    assert len(first) == 6 and find_artifact(runs / "tiny", "depth") is None
    finished = runs / "tiny" / ".depth.partial" / "finished" / "candidates.jsonl"
    finished.write_text(finished.read_text() + '{"without": [1, 2')
    second = pool.run(publish_depth, recipe.model_copy(update={"parallel": PP2}), processes=2)
    assert second[0] == second[1] and len(second[0]) == 5 + 4 - 6
    assert not set(first) & set(second[0]) and len({*first, *second[0]}) == 5 + 4
    artifact = find_artifact(runs / "tiny", "depth")
    assert artifact is not None and artifact.manifest["inputs"].keys() == {"import", "data"}
    assert artifact.result["order"] == one_process[2]["order"][:2]
    assert {path.name for path in artifact.path.iterdir()} == {"manifest.json", "result.json", "status.json", "depth.json"}
    pool.run(publish_stage, "prune", recipe, processes=1)
    pruned = find_artifact(runs / "tiny", "prune")
    assert pruned is not None and pruned.result["dropped_layers"] == sorted(one_process[2]["order"][:2])
    assert pruned.manifest["inputs"]["depth"] == artifact.id


def test_block_influence_of_the_scores_file_is_a_criterion_without_a_pass(pool: Pool, house: Path, tmp_path: Path) -> None:
    settings = Depth(criterion="influence", removal="ranked", drop=2, last_protected=1)
    (found,) = measure(pool, [recipe_with(house, settings)], tmp_path / "depth")
    influence, _ = influence_of_blocks(Statistics.load(house / "tiny" / "importance" / "scores.safetensors"), 1)
    expected = {(layer,): float(influence[layer]) for layer in range(SOURCE.layers - 1)}
    assert values_of(found) == expected and found["order"] == lowest(expected, 2)


WORDS = ["state", "union", "strong", "people", "county", "built", "work", "every", "have", "with"]
ITEMS = [(f"the {word}", [f" of {WORDS[place - 1]}", f" and {WORDS[place - 3]}"], place % 2) for place, word in enumerate(WORDS)]


def write_task(folder: Path) -> Path:
    lines = [json.dumps(dict(zip(("question", "choices", "answer"), item, strict=True))) for item in ITEMS]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    fields = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": "{data_files: {test: %s}}" % (folder / "items.jsonl"),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "''",
        "metric_list": "[{metric: acc, aggregation: mean, higher_is_better: true}]",
    }
    (folder / "tiny.yaml").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    return folder / "tiny.yaml"


def accuracy(plain: PlainModel, encode: Callable[[str], list[int]]) -> float:
    def score(context: str, choice: str) -> float:
        tokens, start = encode(context + choice), len(encode(context))
        with torch.no_grad():
            log = plain.logits(torch.tensor([tokens]))[0].log_softmax(-1)
        return math.fsum(float(log[place - 1, tokens[place]]) for place in range(start, len(tokens)))

    return sum(max(range(2), key=lambda i: score(context, choices[i])) == right for context, choices, right in ITEMS) / len(ITEMS)


@pytest.mark.parametrize("parallel", [ONE, *slow(TP2_PP2)], ids=name_of)
def test_a_tasks_accuracy_without_a_block_is_that_of_a_model_that_never_had_it(
    pool: Pool, house: Path, tmp_path: Path, tiny_hf_model: Callable[..., Path], reference: Reference, parallel: Parallel
) -> None:
    """The block whose loss leaves the highest accuracy goes; of equal ones the later."""
    settings = Depth(criterion="task", tasks=[str(write_task(tmp_path))], drop=2)
    folder = tiny_hf_model("llama")
    (found,) = measure(pool, [recipe_with(house, settings, parallel, tokenizer=str(folder))], tmp_path / "depth")
    encode = load_tokenizer(folder).encode
    expected = {(i, i + 1): accuracy(removed(reference.plain, (i, i + 1)), encode) for i in range(SOURCE.layers - 1)}
    assert values_of(found) == pytest.approx(expected)
    assert len(set(expected.values())) > 1, "the items tell nothing apart"
    assert found["baseline"]["value"] == pytest.approx(accuracy(reference.plain, encode))
    best = max(expected.values())
    assert found["dropped_layers"] == list(max(layers for layers, value in expected.items() if value == best))
