"""Layers whose FFNs differ in width, through the stages: pruned by one ranking over all layers, distilled, exported, and pruned once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.artifact import find_artifact
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.prune import Prune
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.samples import packed_samples
from minitron_megatron.parallel.world import World
from minitron_megatron.scores.statistics import Statistics

from .conftest import Record
from .house import CALIBRATION, SOURCE, build_house, copy_of, publish_stage, recipe_for
from .plain_model import PlainModel, naive_statistics
from .pool import Pool
from .tiny import ONE, SEQUENCE, TP2_PP2, TP2_SP, VOCAB, RandomSamples, layout_name, read_all, relative_difference

WIDTHS = [12, 56, 26, 4, 32, 40]


def recipe_with(runs: Path, parallel: Parallel, prune: dict[str, Any], **distill: Any) -> Recipe:
    return recipe_for(runs, parallel, **distill).model_copy(update={"prune": Prune.model_validate(prune)})


def publish_all(world: World, stages: list[str], recipe: Recipe) -> None:
    for stage in stages:
        publish_stage(world, stage, recipe)
        world.barrier()  # the main process publishes what the next stage of all of them reads


def test_a_model_pruned_by_one_ranking_over_all_layers_is_distilled_and_exported(pool: Pool, house: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    runs = copy_of(house, tmp_path / "runs")
    config = runs / "tiny" / "import" / "hf_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": VOCAB, "rms_norm_eps": SOURCE.norm_eps}))
    prune = {"target": {"layers": 5, "ffn": 31, "heads": 6, "hidden": 30}, "ffn_by": "global", "align": {"ffn": 2}, "head_residual": True}
    recipe = recipe_with(runs, TP2_SP, prune, steps=4, validate_every_steps=4, save_every_steps=100)
    pool.run(publish_all, ["prune", "distill"], recipe, processes=2)
    pool.run(publish_all, ["export"], recipe, processes=1)
    pruned, distilled, exported = (find_artifact(runs / "tiny", stage) for stage in ("prune", "distill", "export"))
    assert pruned and distilled and exported
    arch = Architecture.from_dict(pruned.result["architecture"])
    assert sum(arch.ffn_widths) == 5 * 32 and arch.ffn_per_layer and not any(width % 2 for width in arch.ffn_widths)
    assert pruned.result["rounding"] == json.loads((pruned.path / "plan.json").read_text())["rounding"] == ["ffn 31 → 32 (multiple of 2)"]
    before, after = (read_all(artifact.path / "checkpoint", arch) for artifact in (pruned, distilled))
    assert all(not after[name].equal(before[name]) for name in before if name.endswith(("fc1.weight", "fc2.weight")))
    tokens = RandomSamples(2).tokens
    model = AutoModelForCausalLM.from_pretrained(exported.path / "model")
    with torch.no_grad():
        found, expected = model(tokens).logits, PlainModel(distilled.path / "checkpoint", arch).logits(tokens)
    assert relative_difference(found, expected) <= 1e-4  # fp32 against fp64


@pytest.mark.parametrize("parallel", [ONE, TP2_PP2], ids=layout_name)
def test_a_source_whose_layers_differ_is_measured_and_pruned_again(pool: Pool, tmp_path: Path, parallel: Parallel, measured: Record) -> None:
    source = SOURCE.resized(ffn=WIDTHS)
    runs = tmp_path / "runs"
    build_house(runs, source)
    prune = {"target": {"ffn": [8, 20, 20, 32], "heads": 4, "hidden": 24}, "drop_layers": [1, 3], "align": {"ffn": 2}}
    pool.run(publish_all, ["importance", "prune"], recipe_with(runs, parallel, prune), processes=parallel.processes)
    folder = runs / "tiny"
    samples = packed_samples(folder / "data" / "train", samples=CALIBRATION, sequence_length=SEQUENCE, seed=1234, cache=tmp_path, repeat=False)
    tokens = torch.stack([samples[sample][:-1] for sample in range(CALIBRATION)])
    expected = naive_statistics(PlainModel(folder / "import" / "checkpoint", source), tokens)
    statistics = Statistics.load(folder / "importance" / "scores.safetensors")
    assert statistics.arch == source and statistics.sums.keys() == expected.keys()
    worst = max(relative_difference(statistics.sums[key][..., 0, :], expected[key][..., 0, :]) for key in expected if key[1] == "ffn")
    assert measured("importance of layers of different widths, plain fp64", layout_name(parallel), worst) <= 1e-5
    plan = json.loads((folder / "prune" / "plan.json").read_text())
    assert plan["kept_layers"] == [0, 2, 4, 5] and [len(plan["ffn"][str(layer)]) for layer in (0, 2, 4, 5)] == [8, 20, 20, 32]
    target = read_all(folder / "prune" / "checkpoint", source.resized(layers=4, ffn=[8, 20, 20, 32], heads=4, hidden=24))
    original = read_all(folder / "import" / "checkpoint", source)
    for ours, layer in enumerate(plan["kept_layers"]):
        neurons = plan["ffn"][str(layer)]
        rows = [*neurons, *(neuron + WIDTHS[layer] for neuron in neurons)]
        assert target[f"decoder.layers.{ours}.mlp.linear_fc1.weight"].equal(
            original[f"decoder.layers.{layer}.mlp.linear_fc1.weight"][rows][:, plan["channels"]]
        )
