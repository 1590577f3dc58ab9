"""Margins by hand: in the scores file for every cut, in the plan at its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.errors import ArtifactError
from minitron_megatron.prune.plan import make_plan
from minitron_megatron.scores.margins import cut_margins, load_margins, save_scores, unit_margins
from minitron_megatron.scores.statistics import INFLUENCE, Statistics
from minitron_megatron.scores.units import UnitScores, activation_scores

# 4 heads in each of 2 groups
ARCH = Architecture("llama", 2, 3, 8, 2, 2, 4, 131, False, 64, 1e-6, 10000.0)


def fp64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


SCORES = UnitScores(
    ffn=[fp64(1, 8, 4, 7), fp64(0.5, 2, 1, 2)],
    heads=[fp64(1, 3, 2, 0, 16, 8, 12, 10), fp64(1, 1, 1, 1, 4, 3, 2, 1)],
    channels=fp64(10, 5, 4),
    layers=fp64(0.25, 0.5),
    kv_groups=[fp64(3, 12), fp64(2, 2)],
)


def test_margins_of_every_cut_by_hand() -> None:
    found = {name: values.tolist() for name, values in unit_margins(SCORES, ARCH.kv_groups).items()}
    assert found == {
        "ffn.0": [1 / 8, 3 / 8, 3 / 8],  # 8 7 4 1
        "ffn.1": [0.0, 1 / 2, 1 / 4],  # 2 2 1 0.5: the first cut goes through a tie
        "heads.0": [[1 / 16] * 3, [4 / 16, 2 / 16, 2 / 16]],  # within a group, over the layer's largest
        "heads.1": [[0.0] * 3, [1 / 4] * 3],
        "kv_groups.0": [9 / 12],
        "kv_groups.1": [0.0],
        "channels": [5 / 10, 1 / 10],
        "layers": [1 / 2],
    }


SPARSE_ARCH = Architecture("mixtral", 1, 3, 2, 1, 2, 4, 131, False, 64, 1e-6, 10000.0, None, None, 3, 2)
SPARSE = UnitScores(
    [],
    heads=[fp64(1, 2)],
    channels=fp64(10, 5, 4),
    layers=fp64(1),
    experts=[fp64(8, 2, 7)],
    expert_ffn=[torch.stack([fp64(1, 8, 4, 7), fp64(99, 100, 98, 97), fp64(16, 4, 9, 9)])],
    kv_groups=[torch.ones(1, dtype=torch.float64)],
)


def test_margins_of_experts_and_of_the_neurons_within_each_by_hand(tmp_path: Path) -> None:
    found = {name: values.tolist() for name, values in unit_margins(SPARSE, 1).items()}
    assert found["experts.0"] == [1 / 8, 5 / 8]  # 8 7 2
    assert found["expert_ffn.0"] == [[0.01, 0.03, 0.03], [0.01] * 3, [0.07, 0.0, 0.05]]  # over the largest of the layer
    assert found.keys() == {"experts.0", "expert_ffn.0", "heads.0", "kv_groups.0", "channels", "layers"}
    make_plan(SPARSE, SPARSE_ARCH, SPARSE_ARCH.resized(experts=2, ffn=3)).save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["margins"] == {
        "experts": {"0": 5 / 8},
        "expert_ffn": {"0": 3 / 16},  # 4 - 1 in the first, 9 - 4 in the third; the second is not kept, and its scores are nothing to these
        "heads": {"0": None},
        "kv_groups": {"0": None},
        "channels": None,
        "layers": None,
    }


def test_scores_that_are_all_zero_have_no_margin_and_no_nan() -> None:
    assert cut_margins(torch.zeros(3, dtype=torch.float64)).tolist() == [0.0, 0.0]


def test_the_plan_tells_the_margin_at_its_own_cut(tmp_path: Path) -> None:
    make_plan(SCORES, ARCH, ARCH.resized(ffn=2, heads=4, hidden=2)).save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["margins"] == {
        "ffn": {"0": 3 / 8, "1": 1 / 2},
        "heads": {"0": 1 / 16, "1": 0.0},  # two of four in each group: the closer group's
        "kv_groups": {"0": None, "1": None},
        "channels": 1 / 10,
        "layers": None,  # nothing is cut
    }
    of_kept = make_plan(SCORES, ARCH, ARCH.resized(layers=1)).to_dict()["margins"]
    assert of_kept == {"ffn": {1: None}, "heads": {1: None}, "kv_groups": {1: None}, "channels": None, "layers": 1 / 2}


def statistics() -> Statistics:
    generator = torch.Generator().manual_seed(3)
    widths = {"ffn": ARCH.ffn, "heads": ARCH.heads * ARCH.head_channels, "attention_norm": ARCH.hidden, "mlp_norm": ARCH.hidden}
    sums = {(layer, axis): torch.rand(3, 2, width, generator=generator).double() for layer in range(2) for axis, width in widths.items()}
    return Statistics(ARCH, 5, {**sums, **{(layer, INFLUENCE): fp64(3.0 + layer, 4.0) for layer in range(2)}}, {"model": "x"})


def test_the_scores_file_holds_the_margins_of_the_default_scores_and_the_sums_as_before(tmp_path: Path) -> None:
    expected, path = statistics(), tmp_path / "scores.safetensors"
    save_scores(expected, path)
    scores, found = activation_scores(expected), load_margins(path)
    assert found.keys() == {"ffn.0", "ffn.1", "heads.0", "heads.1", "kv_groups.0", "kv_groups.1", "channels", "layers"}
    best = sorted(scores.ffn[1].tolist(), reverse=True)
    torch.testing.assert_close(found["ffn.1"], fp64(*((best[k] - best[k + 1]) / best[0] for k in range(3))), rtol=1e-15, atol=0)
    group = sorted(scores.heads[0].tolist()[4:], reverse=True)
    by_hand = fp64(*((group[k] - group[k + 1]) / max(scores.heads[0].tolist()) for k in range(3)))
    torch.testing.assert_close(found["heads.0"][1], by_hand, rtol=1e-15, atol=0)
    back = Statistics.load(path)
    assert back.sums.keys() == expected.sums.keys()
    assert all(torch.equal(back.sums[key], value) for key, value in expected.sums.items())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["statistics"])["margins_ranked_by"]
    assert told == {
        "ffn": {"criterion": "input_of_second", "batch": "l2", "sequence": "mean"},
        "heads": {"criterion": "per_channel", "batch": "l2", "sequence": "mean"},
        "kv_groups": {"criterion": "l2_over_heads", "batch": "l2", "sequence": "mean"},
        "channels": {"criterion": "layer_norms", "batch": "l2", "sequence": "mean"},
    }


def test_a_target_can_be_chosen_by_the_stored_margins(tmp_path: Path) -> None:
    """What the file says of a cut is what the plan that makes it says."""
    save_scores(statistics(), tmp_path / "s")
    stored, scores = load_margins(tmp_path / "s"), activation_scores(statistics())
    told = make_plan(scores, ARCH, ARCH.resized(ffn=3, heads=6, hidden=1)).margins
    assert told["ffn"] == {layer: stored[f"ffn.{layer}"][2].item() for layer in range(2)}
    assert told["heads"] == {layer: stored[f"heads.{layer}"][:, 2].min().item() for layer in range(2)}
    assert told["channels"] == stored["channels"][0].item()
    one_layer = make_plan(replace(scores, layers=scores.layers), ARCH, ARCH.resized(layers=1)).margins
    assert one_layer["layers"] == stored["layers"][0].item()


def test_a_file_that_is_not_there_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="make it anew with: minitron importance RECIPE"):
        load_margins(tmp_path / "nowhere")
