"""The teacher's own text: the same bytes under every layout and after an interruption, and what distillation makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from minitron_megatron.artifact import find_artifact
from minitron_megatron.chain import STAGES, is_asked, stage_inputs
from minitron_megatron.config.labels import Labels
from minitron_megatron.config.parallel import Parallel
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.samples import packed_samples
from minitron_megatron.labels import stage
from minitron_megatron.parallel.layout import destroy_layout
from minitron_megatron.parallel.world import World

from .conftest import Record
from .house import SOURCE, TARGET, copy_of, publish_stage, recipe_for
from .plain_model import PlainModel
from .pool import Pool
from .tiny import DP2, ONE, PP2, PP2_VPP2, SEQUENCE, TP2_SP, layout_name, relative_difference

TEXTS, PROMPT = 8, 5
NEW = SEQUENCE + 1 - PROMPT  # a text fills a sample


def asked(runs: Path, parallel: Parallel = ONE, *, distill: dict[str, Any] | None = None, **labels: Any) -> Recipe:
    defaults = {"samples": TEXTS, "prompt_tokens": PROMPT, "new_tokens": NEW, "micro_batch": 2, "save_every_samples": 3}
    return recipe_for(runs, parallel, **(distill or {})).model_copy(update={"labels": Labels(**{**defaults, **labels})})


def files_of(runs: Path) -> dict[str, bytes]:
    names = ("train.bin", "train.idx", "train-weights.bin", "train-weights.idx")
    return {name: (runs / "tiny" / "labels" / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def written(pool: Pool, house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs` with the artifact `labels` of one process."""
    runs = copy_of(house, tmp_path_factory.mktemp("labels") / "runs")
    pool.run(publish_stage, "labels", asked(runs), processes=1)
    return runs


def test_texts_are_beginnings_of_samples_and_what_the_teacher_finds_likeliest(written: Path) -> None:
    folder = written / "tiny" / "labels"
    texts, weights = IndexedDataset(str(folder / "train")), IndexedDataset(str(folder / "train-weights"))
    order = written / "order"
    samples = packed_samples(written / "tiny" / "data" / "train", samples=TEXTS, sequence_length=PROMPT, seed=1234, cache=order, repeat=False)
    plain = PlainModel(written / "tiny" / "import" / "checkpoint", SOURCE)
    assert len(texts) == TEXTS
    for number in range(TEXTS):
        text = texts[number].astype(np.int64)
        assert text[:PROMPT].tolist() == samples[number][:PROMPT].tolist()
        assert weights[number].tolist() == [0] * PROMPT + [1] * (len(text) - PROMPT)
        with torch.no_grad():
            likeliest = plain.logits(torch.from_numpy(text)[None])[0].argmax(-1)
        assert text[PROMPT:].tolist() == likeliest[PROMPT - 1 : -1].tolist()
        assert len(text) == PROMPT + NEW or text[-1] == 0
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []  # neither blocks nor the order are left
    artifact = find_artifact(written / "tiny", "labels")
    assert artifact is not None and artifact.result["written_tokens"] == sum(len(texts[n]) - PROMPT for n in range(TEXTS))


@pytest.mark.parametrize("parallel", [TP2_SP, PP2, DP2], ids=layout_name)
def test_every_layout_and_block_size_writes_the_same_bytes(pool: Pool, house: Path, written: Path, tmp_path: Path, parallel: Parallel) -> None:
    """fp32 and greedy: the two likeliest tokens of these models lie further apart than rounding."""
    runs = copy_of(house, tmp_path / "runs")
    pool.run(publish_stage, "labels", asked(runs, parallel, save_every_samples=4, micro_batch=1), processes=parallel.processes)
    assert files_of(runs) == files_of(written)


def interrupted_and_continued(world: World, runs: Path) -> list[int]:
    """Texts that each call of generate was asked for; the second call breaks off."""
    sizes: list[int] = []
    original = stage.generate

    def watched(model: Any, prompts: torch.Tensor, **options: Any) -> list[list[int]]:
        sizes.append(len(prompts))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return original(model, prompts, **options)

    stage.generate = watched  # type: ignore[attr-defined]
    try:
        publish_stage(world, "labels", asked(runs))
    except KeyboardInterrupt:
        destroy_layout()
        publish_stage(world, "labels", asked(runs, save_every_samples=2))
    finally:
        stage.generate = original  # type: ignore[attr-defined]
    return sizes


def test_an_interrupted_stage_writes_what_is_missing(pool: Pool, house: Path, written: Path, tmp_path: Path) -> None:
    runs = copy_of(house, tmp_path / "runs")
    sizes = pool.run(interrupted_and_continued, runs, processes=1)[0]
    assert sizes == [3, 3, 2, 2, 1]  # a block, the one that broke, and the other five texts in blocks of the new size
    assert files_of(runs) == files_of(written)


def test_distillation_trains_on_what_the_teacher_wrote(pool: Pool, written: Path, tmp_path: Path, measured: Record) -> None:
    """The first step takes each text once: its cross-entropy is that of the written tokens alone, by the plain model in fp64."""
    runs = copy_of(written, tmp_path / "runs")
    texts = IndexedDataset(str(runs / "tiny" / "labels" / "train"))
    settings = {"steps": 4, "global_batch": TEXTS, "save_every_steps": 9}
    recipe = asked(runs, distill=settings)
    pool.run(publish_stage, "distill", recipe, processes=1)
    records = [json.loads(line) for line in (runs / "tiny" / "distill" / "metrics.jsonl").read_text().splitlines()]
    found = next(record["cross_entropy"] for record in records if record.get("step") == 1)
    plain = PlainModel(runs / "tiny" / "prune" / "checkpoint", TARGET)
    losses = []
    for number in range(TEXTS):
        text = torch.from_numpy(texts[number].astype(np.int64))
        with torch.no_grad():
            log_probabilities = plain.logits(text[None, :-1])[0].log_softmax(-1)
        losses += (-log_probabilities.gather(-1, text[1:, None]))[PROMPT - 1 :, 0].tolist()
    assert measured("loss on the teacher's own text", "one", relative_difference(found, np.mean(losses))) <= 1e-6  # fp32 against fp64


def test_a_recipe_without_labels_has_no_such_stage(tmp_path: Path) -> None:
    plain = recipe_for(tmp_path)
    assert not is_asked(STAGES["labels"], plain) and "labels" not in stage_inputs(STAGES["distill"], plain)
    assert "labels" in stage_inputs(STAGES["distill"], asked(tmp_path))


def test_the_layout_that_writes_has_no_virtual_stages_and_no_shared_sequence() -> None:
    found = stage.writing_layout(PP2_VPP2.model_copy(update={"layers_per_stage": [1, 2, 1, 1]}), SOURCE)
    assert (found.virtual, found.layers_per_stage, found.sequence) == (1, "cost", False)
    assert not stage.writing_layout(TP2_SP, SOURCE).sequence
