"""One plan cuts the same bits out of a checkpoint, whichever layout wrote it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from minitron_megatron.artifact import find_artifact
from minitron_megatron.config.parallel import Parallel

from .house import SOURCE, TARGET, copy_of, publish_stage, recipe_for
from .pool import Pool
from .test_checkpoints import load_run_save
from .tiny import ONE, PP2_EVEN, TP2_PP2, layout_name, read_all


@pytest.mark.parametrize("parallel", [ONE, PP2_EVEN, TP2_PP2], ids=layout_name)
def test_pruned_weights_are_the_same_bits_for_every_source_layout(pool: Pool, house: Path, tmp_path: Path, parallel: Parallel) -> None:
    runs = copy_of(house, tmp_path / "runs")
    expected = find_artifact(runs / "tiny", "prune")
    assert expected is not None
    digest = expected.result["weights_sha256"]
    source = runs / "tiny" / "import" / "checkpoint"
    pool.run(load_run_save, parallel, SOURCE, source, tmp_path / "written_by_megatron", processes=parallel.processes)
    shutil.rmtree(source)
    (tmp_path / "written_by_megatron").rename(source)
    shutil.rmtree(expected.path)
    pool.run(publish_stage, "prune", recipe_for(runs), processes=1)
    found = find_artifact(runs / "tiny", "prune")
    assert found is not None
    assert found.result["weights_sha256"] == digest


def test_a_pruned_tensor_is_rows_and_columns_of_the_source(house: Path) -> None:
    """Gate and up rows of the kept neurons, embedding columns of the kept channels, by hand from the plan on disk."""
    folder = house / "tiny"
    plan = json.loads((folder / "prune" / "plan.json").read_text())
    source, target = read_all(folder / "import" / "checkpoint", SOURCE), read_all(folder / "prune" / "checkpoint", TARGET)
    embedding = source["embedding.word_embeddings.weight"][:, plan["channels"]]
    assert target["embedding.word_embeddings.weight"].equal(embedding)
    for ours, layer in enumerate(plan["kept_layers"]):
        neurons = plan["ffn"][str(layer)]
        rows = neurons + [neuron + SOURCE.ffn for neuron in neurons]
        expected = source[f"decoder.layers.{layer}.mlp.linear_fc1.weight"][rows][:, plan["channels"]]
        assert target[f"decoder.layers.{ours}.mlp.linear_fc1.weight"].equal(expected)
