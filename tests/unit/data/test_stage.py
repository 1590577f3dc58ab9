"""The data stage as a whole: what it publishes, what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from minitron_megatron.artifact import Artifact, write_json
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data import stage
from minitron_megatron.data.samples import evaluation_windows, packed_samples
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.data.vocabulary import check_vocabulary, refuse_other_tokenizer
from minitron_megatron.errors import DataError


def recipe(text_files: list[Path], **data: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"path": "unused"},
            "data": {"train": [f"{text_files[0].parent}/*.txt"], "heldout_documents": 5, "workers": 1, **data},
            "importance": {"samples": 4, "sequence_length": 32},
            "prune": {"target": {"ffn": 8}},
            "distill": {"steps": 100, "sequence_length": 32, "global_batch": 1},
            "evaluate": {"sequence_length": 32},
        }
    )


@pytest.fixture
def imported(hf_folder: Path, tmp_path: Path) -> Artifact:
    folder = tmp_path / "import"
    shutil.copytree(hf_folder, folder / "tokenizer")
    write_json(folder / "result.json", {"architecture": {"vocab": 384}})
    return Artifact(folder, {"id": "x"})


def test_the_stage_publishes_three_parts_with_their_digests(text_files: list[Path], imported: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    asked = recipe(text_files, out_of_domain=[str(text_files[0]), str(text_files[1]), str(text_files[2])])
    result = stage.run(asked, {"import": imported}, folder)
    assert {name: part["documents"] for name, part in result["parts"].items()} == {
        "train": 35,
        "heldout": 5,
        "out_of_domain": 3,
    }
    for name, part in result["parts"].items():
        assert part["sha256"] == hashlib.sha256((folder / f"{name}.bin").read_bytes()).hexdigest()
        assert part["tokens"] == IndexedDataset(str(folder / name)).sequence_lengths.sum()
    assert (result["eod"], result["vocab_size"]) == (0, 320)
    assert sorted(path.suffix for path in folder.iterdir()) == [".bin"] * 3 + [".idx"] * 3  # no blocks are left


def test_heldout_documents_never_appear_in_training_samples(text_files: list[Path], imported: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    stage.run(recipe(text_files), {"import": imported}, folder)
    dataset = packed_samples(folder / "train", samples=200, sequence_length=32, seed=1, cache=folder / "cache")
    windows = evaluation_windows(folder / "heldout", sequence_length=32, tokens="all")
    tokenizer = load_tokenizer(imported.path / "tokenizer")
    marks = [f" no. {number * 31} " for number in range(40)]  # the end of each document names it
    trained = {mark for number in range(200) for mark in marks if mark in tokenizer.decode(dataset[number].tolist())}
    held = {mark for number in range(len(windows)) for mark in marks if mark in tokenizer.decode(windows[number].tolist())}
    assert trained and trained <= set(marks[:35])
    assert held and held <= set(marks[35:])


def test_outside_files_are_texts_and_a_tokenizer_of_the_recipe(text_files: list[Path], hf_folder: Path) -> None:
    assert stage.outside_files(recipe(text_files)) == text_files
    with_tokenizer = stage.outside_files(recipe(text_files, tokenizer=str(hf_folder)))
    assert {path.name for path in set(with_tokenizer) - set(text_files)} == {"tokenizer.json", "tokenizer_config.json"}


def test_a_tokenizer_of_another_model_is_refused_with_both_sizes(
    text_files: list[Path], imported: Artifact, sentencepiece_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="vocabulary of 80 is not the model's of 384"):  # sentencepiece: must be equal
        stage.run(recipe(text_files, tokenizer=str(sentencepiece_file)), {"import": imported}, tmp_path / "out")
    write_json(imported.path / "result.json", {"architecture": {"vocab": 300}})
    imported = Artifact(imported.path, imported.manifest)  # the first one has read its result
    with pytest.raises(DataError, match="vocabulary of 320 is not the model's of 300"):
        stage.run(recipe(text_files), {"import": imported}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_too_short_for_later_stages_is_refused_here(text_files: list[Path], imported: Artifact, tmp_path: Path) -> None:
    asked = recipe(text_files)
    importance = asked.importance.model_copy(update={"samples": 5000})
    with pytest.raises(DataError, match=r"importance\.samples=5000 of 32 tokens need 160001 tokens, there are \d+; at most"):
        stage.run(asked.model_copy(update={"importance": importance}), {"import": imported}, tmp_path / "out")
    evaluate = asked.evaluate.model_copy(update={"sequence_length": 100_000})
    with pytest.raises(DataError, match=r"heldout text: .* raise data\.heldout_documents"):
        stage.run(asked.model_copy(update={"evaluate": evaluate}), {"import": imported}, tmp_path / "out")


TOO_SHORT = {
    "depth": (
        {"depth": {"samples": 4000, "sequence_length": 32}},
        r"depth\.samples=4000 of 32 tokens need 128001 tokens, .* at most depth\.samples=\d",
    ),
    "samples behind others": (
        {"importance": {"samples": 4, "skip_samples": 5000, "sequence_length": 32}},
        r"importance\.samples=4 of 32 tokens behind the first 5000 need 160129 tokens, there are \d+; at most importance\.samples=0",
    ),
    "a search's windows": (
        {"search": {"space": {"ffn": [8]}, "short_distillation": {"sequence_length": 100_000}}, "prune": {}},
        r"heldout text: .* or shorten search\.short_distillation\.sequence_length$",
    ),
}


@pytest.mark.parametrize("case", TOO_SHORT)
def test_text_too_short_for_what_a_recipe_may_ask_for_is_refused_too(case: str, text_files: list[Path], imported: Artifact, tmp_path: Path) -> None:
    sections, problem = TOO_SHORT[case]
    asked = Recipe.model_validate({**recipe(text_files).model_dump(), **sections})
    with pytest.raises(DataError, match=problem):
        stage.run(asked, {"import": imported}, tmp_path / "out")


def test_a_models_own_sentencepiece_may_be_smaller_than_its_padded_embeddings(sentencepiece_file: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_file)
    check_vocabulary(tokenizer, 128, foreign=False)
    with pytest.raises(DataError, match="of 80 is not the model's of 128"):
        check_vocabulary(tokenizer, 128, foreign=True)


def test_a_tokenizer_that_gives_other_ids_than_the_models_own_is_refused(text_files: list[Path], imported: Artifact, tmp_path: Path) -> None:
    """A smaller foreign vocabulary fits the embeddings: nothing but its ids tells that every later stage would train on nonsense."""
    foreign = tmp_path / "foreign"
    shutil.copytree(imported.path / "tokenizer", foreign)
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:3]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match=r"gives other ids than the model's own; leave data.tokenizer out"):
        stage.run(recipe(text_files, tokenizer=str(foreign)), {"import": imported}, tmp_path / "out")
    refuse_other_tokenizer(load_tokenizer(imported.path / "tokenizer"), imported.path / "tokenizer")
