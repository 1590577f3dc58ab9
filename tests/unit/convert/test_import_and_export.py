"""What the import and export stages leave beside the weights, and what they refuse before they write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitron_megatron.artifact import Artifact, write_json
from minitron_megatron.config.schema import Recipe
from minitron_megatron.convert import export_stage, import_stage
from minitron_megatron.errors import ArtifactError, CheckpointError


def recipe(**model: str) -> Recipe:
    values = {"name": "tiny", "model": model, "data": {"train": ["x"]}, "prune": {"target": {}}, "distill": {"steps": 100}}
    return Recipe.model_validate(values)


@pytest.fixture
def source(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_hf_model("llama"), tmp_path / "source"))


def import_it(source: Path, folder: Path) -> Artifact:
    folder.mkdir()
    write_json(folder / "result.json", import_stage.run(recipe(path=str(source)), {}, folder))
    return Artifact(folder, {"id": "x"})


def export_it(imported: Artifact, folder: Path) -> Path:
    """Exports the imported model as its own student."""
    folder.mkdir(exist_ok=True)
    layers = imported.result["architecture"]["layers"]
    write_json(imported.path / "result.json", {**imported.result, "kept_layers": list(range(layers))})
    same = Artifact(imported.path, imported.manifest)
    export_stage.run(recipe(path="unused"), {"import": same, "prune": same, "distill": same}, folder)
    return folder / "model"


def test_tokenizer_and_config_travel_to_the_exported_model(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = export_it(import_it(source, tmp_path / "import"), tmp_path / "export")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (model / name).read_bytes() == (source / name).read_bytes()
    text = "the state of our union"
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, model))
    assert {key: after[key] for key in before} == before
    AutoModelForCausalLM.from_pretrained(model)


def test_parts_of_different_types_are_joined_without_rounding(source: Path, tmp_path: Path) -> None:
    """Keys in fp32 beside queries and values in bf16: the fused tensor is what the digest and the metadata say, with every bit of the keys."""
    import torch
    from safetensors.torch import load_file, save_file

    from minitron_megatron.arch.architecture import Architecture
    from minitron_megatron.checkpoint.torch_dist import MegatronSource, weights_digest

    tensors = {name: tensor if "k_proj" in name else tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors")
    imported = import_it(source, tmp_path / "import")
    checkpoint = MegatronSource(imported.path / "checkpoint", Architecture.from_dict(imported.result["architecture"]))
    assert weights_digest(checkpoint) == imported.result["weights_sha256"]
    exported = load_file(export_it(imported, tmp_path / "export") / "model.safetensors")
    assert all(torch.equal(exported[name], tensor.to(exported[name].dtype)) for name, tensor in tensors.items())
    assert {tensor.dtype for name, tensor in exported.items() if "k_proj" in name} == {torch.float32}


def test_the_exported_config_names_the_type_of_the_weights_in_either_spelling(source: Path, tmp_path: Path) -> None:
    """transformers 4 wrote torch_dtype; a student trained in fp32 out of a bf16 source must not be loaded in bf16."""
    from transformers import AutoConfig

    config = json.loads((source / "config.json").read_text())
    config.pop("dtype", None)
    (source / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    model = export_it(import_it(source, tmp_path / "import"), tmp_path / "export")
    after = json.loads((model / "config.json").read_text())
    assert {after.get("dtype"), after.get("torch_dtype")} <= {"float32", None}
    assert str(AutoConfig.from_pretrained(model).dtype).removeprefix("torch.") == "float32"


def test_a_lack_of_disk_space_is_told_before_anything_is_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = import_it(source, tmp_path / "import")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ArtifactError, match="no disk space for the imported checkpoint"):
        import_stage.run(recipe(path=str(source)), {}, tmp_path / "again")
    with pytest.raises(ArtifactError, match="no disk space for the exported model"):
        export_it(imported, tmp_path / "export")
    assert not (tmp_path / "again").exists()
    assert list((tmp_path / "export").iterdir()) == []


def test_outside_files_are_all_files_of_the_source_and_of_a_megatron_checkpoints_config(source: Path, tmp_path: Path) -> None:
    assert set(import_stage.outside_files(recipe(path=str(source)))) == set(source.iterdir())
    checkpoint = tmp_path / "megatron" / "iter_0000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "x.distcp").write_text("")
    found = import_stage.outside_files(recipe(path=str(tmp_path / "megatron"), hf_config=str(source / "config.json")))
    assert set(found) == {checkpoint / "x.distcp", *source.iterdir()}


def test_a_folder_that_holds_no_model_is_refused_in_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="must name a Hugging Face folder") as caught:
        import_stage.run(recipe(path=str(tmp_path / "empty"), hf_config=str(source / "config.json")), {}, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_result_says_what_was_imported(source: Path, tmp_path: Path) -> None:
    result: dict[str, Any] = import_it(source, tmp_path / "import").result
    assert result["parameters"] * 4 == result["bytes"]
    assert len(result["weights_sha256"]) == 64
