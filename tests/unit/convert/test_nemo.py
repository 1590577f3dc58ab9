"""Weights into .nemo archives and back; archives as NeMo 1.x wrote them; what an archive may not do."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.arch.source import source_architecture
from minitron_megatron.artifact import Artifact, write_json
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.config.schema import Recipe
from minitron_megatron.convert import export_stage, import_stage
from minitron_megatron.errors import ArchitectureError, CheckpointError, MinitronError

VARIANTS = [("llama3", False), ("llama3", True), ("mistral", False), ("qwen2", True), ("qwen3", False), ("nemotron", False), ("nemotron", True)]


def recipe(path: Path, format: str = "nemo") -> Recipe:
    values = {"name": "tiny", "model": {"path": str(path)}, "data": {"train": ["x"]}, "prune": {"target": {}}, "distill": {"steps": 100}}
    return Recipe.model_validate({**values, "export": {"format": format}})


def import_it(source: Path, folder: Path) -> Artifact:
    folder.mkdir()
    result = import_stage.run(recipe(source), {}, folder)
    write_json(folder / "result.json", {**result, "kept_layers": list(range(result["architecture"]["layers"]))})
    return Artifact(folder, {"id": "x"})


def export_it(imported: Artifact, folder: Path, format: str = "nemo") -> Path:
    """Exports the imported model as its own student."""
    folder.mkdir()
    export_stage.run(recipe(Path("unused"), format), {"import": imported, "prune": imported, "distill": imported}, folder)
    return folder / ("model.nemo" if format == "nemo" else "model")


@pytest.mark.parametrize(("family", "tied"), VARIANTS)
def test_a_model_that_goes_through_an_archive_comes_back_bit_by_bit(
    family: str, tied: bool, tiny_hf_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_hf_model(family, tie_word_embeddings=tied)
    first = import_it(source, tmp_path / "first")
    archive = export_it(first, tmp_path / "export")
    assert [path.name for path in archive.parent.iterdir()] == ["model.nemo"]
    again = import_it(archive, tmp_path / "again")
    assert again.result["weights_sha256"] == first.result["weights_sha256"]
    assert again.result["architecture"] == first.result["architecture"]
    for file in (first.path / "tokenizer").iterdir():
        if file.name != "config.json":
            assert (again.path / "tokenizer" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("format", ["nemo", "huggingface"])
def test_an_export_that_was_killed_is_made_anew_in_the_same_folder(format: str, tiny_hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """A killed stage finds its files again, half-written ones too."""
    first = import_it(tiny_hf_model("llama3"), tmp_path / "first")
    for half in ("archive/model_weights/__0_0.distcp", "archive/tokenizer/tokenizer.json", "model/stale.safetensors", "model.nemo"):
        path = tmp_path / "begun" / half
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    begun = Artifact(tmp_path / "begun", {"id": "x"})
    result = export_stage.run(recipe(Path("unused"), format), {"import": first, "prune": first, "distill": first}, begun.path)
    whole = export_it(first, tmp_path / "export", format)
    assert result["parameters"] == first.result["parameters"]
    if format == "nemo":
        assert import_it(begun.path / "model.nemo", tmp_path / "again").result["weights_sha256"] == first.result["weights_sha256"]
    else:
        assert {path.name for path in (begun.path / "model").iterdir()} == {path.name for path in whole.iterdir()}


def test_transformers_loads_what_was_imported_out_of_an_archive(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """config.json is then made of model_config.yaml: the same logits say that nothing in it is wrong."""
    from transformers import AutoModelForCausalLM

    for family in ("llama3", "nemotron"):
        source = tiny_hf_model(family)
        archive = export_it(import_it(source, tmp_path / f"{family}-first"), tmp_path / f"{family}-nemo")
        model = export_it(import_it(archive, tmp_path / f"{family}-again"), tmp_path / f"{family}-hf", "huggingface")
        tokens = torch.arange(2, 130)[None]
        with torch.no_grad():
            expected, actual = (AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (source, model))
        assert torch.equal(actual, expected)


def test_an_archive_is_what_nemo_writes(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """An uncompressed tar below ./, model_config.yaml, layers of a kind in one tensor under `model.`."""
    from minitron_megatron.checkpoint.torch_dist import TorchDistReader

    archive = export_it(import_it(tiny_hf_model("nemotron"), tmp_path / "first"), tmp_path / "export")
    with tarfile.open(archive, "r:") as tar:
        assert all(name == "." or name.startswith("./") for name in tar.getnames())
        assert {(member.uid, member.uname) for member in tar.getmembers()} == {(0, "")}
        tar.extractall(tmp_path / "out", filter="data")
    fields = yaml.safe_load((tmp_path / "out" / "model_config.yaml").read_text())
    assert (fields["activation"], fields["normalization"], fields["rotary_percentage"]) == ("squared-relu", "layernorm1p", 0.67)
    assert (fields["num_layers"], fields["num_query_groups"], fields["kv_channels"], fields["override_vocab_size"]) == (3, 2, 6, 131)
    shapes = {key: tuple(entry.size) for key, entry in TorchDistReader(tmp_path / "out" / "model_weights").tensors.items()}
    assert shapes == {
        "model.embedding.word_embeddings.weight": (131, 40),
        "model.decoder.layers.self_attention.linear_qkv.layer_norm_weight": (3, 40),
        "model.decoder.layers.self_attention.linear_qkv.layer_norm_bias": (3, 40),
        "model.decoder.layers.self_attention.linear_qkv.weight": (3, 72, 40),
        "model.decoder.layers.self_attention.linear_proj.weight": (3, 40, 48),
        "model.decoder.layers.mlp.linear_fc1.layer_norm_weight": (3, 40),
        "model.decoder.layers.mlp.linear_fc1.layer_norm_bias": (3, 40),
        "model.decoder.layers.mlp.linear_fc1.weight": (3, 28, 40),
        "model.decoder.layers.mlp.linear_fc2.weight": (3, 40, 28),
        "model.decoder.final_layernorm.weight": (40,),
        "model.decoder.final_layernorm.bias": (40,),
        "model.output_layer.weight": (131, 40),
    }


# --- archives as NeMo wrote them


CORE_TO_LEGACY = {
    "embedding.": "language_model.embedding.",
    "output_layer.": "language_model.output_layer.",
    "decoder.": "language_model.encoder.",
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
    "self_attention.linear_qkv.": "self_attention.query_key_value.",
    "self_attention.linear_proj.": "self_attention.dense.",
    "mlp.linear_fc1.": "mlp.dense_h_to_4h.",
    "mlp.linear_fc2.": "mlp.dense_4h_to_h.",
}


def legacy_name(name: str) -> str:
    """By NeMo's converters (convert_llama_hf_to_nemo.py), which write both kinds of name."""
    for core, legacy in CORE_TO_LEGACY.items():
        name = name.replace(core, legacy, 1) if core in name else name
    return name


class Foreign:
    """A model's weights, and files for an archive that this project does not write."""

    def __init__(self, source: Path, folder: Path, tokenizer: str = "tokenizer.json") -> None:
        self.arch: Architecture = source_architecture(str(source))
        reader = HuggingFaceSource(source, self.arch)
        self.weights = {row.name: reader.read(row) for row in tensor_table(self.arch)}
        self.source, self.folder = source, folder
        folder.mkdir()
        if tokenizer == "tokenizer.json":
            (folder / "tokenizer").mkdir()
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (folder / "tokenizer" / name).write_bytes((source / name).read_bytes())
        self.configure()

    def configure(self, **changes: Any) -> None:
        """model_config.yaml of a nemotron as NeMo 1.x writes it, with references and without what is at its default."""
        fields = {
            "mcore_gpt": True,
            "tensor_model_parallel_size": 1,
            "encoder_seq_length": 1024,
            "max_position_embeddings": "${.encoder_seq_length}",
            "num_layers": 3,
            "hidden_size": 40,
            "ffn_hidden_size": 28,
            "num_attention_heads": 8,
            "num_query_groups": 2,
            "kv_channels": 6,
            "normalization": "layernorm1p",
            "layernorm_epsilon": 1e-5,
            "override_vocab_size": 131,
            "bias": False,
            "activation": "squared-relu",
            "position_embedding_type": "rope",
            "rotary_percentage": 0.67,
            "share_embeddings_and_output_weights": False,
            "tokenizer": {"library": "huggingface", "type": "somewhere/else"},
            "precision": "bf16-mixed",
        }
        (self.folder / "model_config.yaml").write_text(yaml.safe_dump({**fields, **changes}))

    def archive(self, path: Path, mode: str = "w:") -> Path:
        with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
            tar.add(self.folder, arcname=".")
        return path

    def digest(self, tmp_path: Path) -> str:
        return str(import_it(self.source, tmp_path / "from_hf").result["weights_sha256"])


@pytest.fixture
def foreign(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> Foreign:
    return Foreign(tiny_hf_model("nemotron"), tmp_path / "foreign")


@pytest.mark.parametrize("style", ["core", "half precision", "legacy", "state_dict, compressed, padded"])
def test_pickled_weights_are_read_under_every_name_that_nemo_gives_them(style: str, foreign: Foreign, tmp_path: Path) -> None:
    ahead = "model.module." if style == "half precision" else "model."
    names: Callable[[str], str] = legacy_name if style == "legacy" else str
    state: dict[str, Any] = {ahead + names(name): tensor for name, tensor in foreign.weights.items()}
    state[f"{ahead}decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"fp8 scales")  # Transformer Engine's
    state[f"{ahead}rotary_pos_emb.inv_freq"] = torch.ones(2)
    if style.startswith("state_dict"):
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            state[ahead + name] = torch.cat([foreign.weights[name], torch.full((61, 40), 7.0)])
        state = {"state_dict": state}
    torch.save(state, foreign.folder / "model_weights.ckpt")
    archive = foreign.archive(tmp_path / "x.nemo", "w:gz" if "compressed" in style else "w:")
    imported = import_it(archive, tmp_path / "import")
    assert imported.result["weights_sha256"] == foreign.digest(tmp_path)
    assert imported.result["architecture"] == foreign.arch.to_dict()


def write_zarr(folder: Path, tensor: Tensor, chunks: list[int], **changes: Any) -> None:
    """As the format's specification has it (zarr v2): every chunk whole, the last ones filled up, numbers joined by dots."""
    import itertools

    folder.mkdir(parents=True)
    names = {torch.float32: "<f4", torch.bfloat16: "bfloat16"}
    header = {"zarr_format": 2, "shape": list(tensor.shape), "chunks": chunks, "dtype": names[tensor.dtype], "order": "C", "fill_value": None}
    (folder / ".zarray").write_text(json.dumps({**header, "compressor": None, "filters": None, **changes}))
    for place in itertools.product(*(range(-(-size // chunk)) for size, chunk in zip(tensor.shape, chunks, strict=True))):
        whole = torch.full(chunks, 9.0, dtype=tensor.dtype)
        part = tensor[tuple(slice(number * chunk, (number + 1) * chunk) for number, chunk in zip(place, chunks, strict=True))]
        whole[tuple(slice(size) for size in part.shape)] = part
        (folder / ".".join(map(str, place))).write_bytes(whole.view(torch.uint8).numpy().tobytes())


def write_zarr_checkpoint(foreign: Foreign, dtype: torch.dtype = torch.float32) -> Path:
    """As NeMo 1.22 wrote Nemotron-4: stacked layers, chunks of two tensor ranks and of other sizes than the regions that are asked for."""
    weights = foreign.folder / "model_weights"
    kinds: dict[str, list[Tensor]] = {}
    for row in tensor_table(foreign.arch):
        key = f"model.{row.name}".replace(f".layers.{row.layer}.", ".layers.")
        kinds.setdefault(key, []).append(foreign.weights[row.name].to(dtype))
    for key, tensors in kinds.items():
        tensor = torch.stack(tensors) if ".layers." in key else tensors[0]
        write_zarr(weights / key, tensor, [max(size // 2, 1) for size in tensor.shape])
    (weights / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    return weights


def test_zarr_weights_are_read_without_zarr(foreign: Foreign, tmp_path: Path) -> None:
    write_zarr_checkpoint(foreign)
    imported = import_it(foreign.archive(tmp_path / "x.nemo"), tmp_path / "import")
    assert imported.result["weights_sha256"] == foreign.digest(tmp_path)


def test_zarr_weights_in_bf16_keep_their_bits(foreign: Foreign, tmp_path: Path) -> None:
    from minitron_megatron.checkpoint.torch_dist import MegatronSource

    write_zarr_checkpoint(foreign, torch.bfloat16)
    imported = import_it(foreign.archive(tmp_path / "x.nemo"), tmp_path / "import")
    source = MegatronSource(imported.path / "checkpoint", foreign.arch)
    for row in tensor_table(foreign.arch):
        assert torch.equal(source.read(row), foreign.weights[row.name].bfloat16()), row.name


def test_a_zarr_chunk_that_is_missing_and_one_that_is_compressed_are_refused(foreign: Foreign, tmp_path: Path) -> None:
    weights = write_zarr_checkpoint(foreign)
    (weights / "model.decoder.layers.mlp.linear_fc2.weight" / "1.0.0").unlink()
    with pytest.raises(CheckpointError, match=r"1\.0\.0 of tensor model\.decoder\.layers\.mlp\.linear_fc2\.weight is missing"):
        import_it(foreign.archive(tmp_path / "x.nemo"), tmp_path / "import")
    header = weights / "model.decoder.final_layernorm.bias" / ".zarray"
    header.write_text(json.dumps({**json.loads(header.read_text()), "compressor": {"id": "blosc"}}))
    with pytest.raises(CheckpointError, match="not an uncompressed zarr array"):
        import_it(foreign.archive(tmp_path / "y.nemo"), tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bias": True}, "bias=True is not supported; expected False"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type='learned_absolute' is not supported; expected 'rope'"),
        ({"activation": "gelu"}, "activation='gelu' with normalization='layernorm1p' is no known family; known: squared-relu with layernorm1p"),
        ({"num_moe_experts": 8}, "num_moe_experts=8 is not supported"),
        ({"hidden_size": None}, "hidden_size is missing or no whole number"),
        ({"num_query_groups": "two"}, "num_key_value_heads is missing or no whole number (found 'two')"),
        ({"layernorm_epsilon": "small"}, "layernorm_epsilon is no number (found 'small')"),
        ({"activation": "swiglu", "normalization": "rmsnorm", "window_size": 4096}, "window_size=4096 is not supported"),
    ],
)
def test_what_nemo_can_say_and_is_not_built_here_is_refused_by_its_field(
    changes: dict[str, Any], told: str, foreign: Foreign, tmp_path: Path
) -> None:
    foreign.configure(**changes)
    with pytest.raises(ArchitectureError) as caught:
        source_architecture(str(foreign.archive(tmp_path / "x.nemo")))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_several_ranks_and_archives_without_any_are_refused_with_the_mend(foreign: Foreign, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the archive holds neither model_weights/"):
        import_it(foreign.archive(tmp_path / "x.nemo"), tmp_path / "a")
    (foreign.folder / "mp_rank_00").mkdir()
    torch.save({}, foreign.folder / "mp_rank_00" / "model_weights.ckpt")
    with pytest.raises(CheckpointError, match="merge them in NeMo"):
        import_it(foreign.archive(tmp_path / "y.nemo"), tmp_path / "b")


def test_a_truncated_archive_and_one_that_is_not_there_are_told_in_one_line(foreign: Foreign, tmp_path: Path) -> None:
    torch.save({f"model.{name}": tensor for name, tensor in foreign.weights.items()}, foreign.folder / "model_weights.ckpt")
    whole = foreign.archive(tmp_path / "x.nemo").read_bytes()
    for kept in (0, 100, len(whole) // 2):
        (tmp_path / "cut.nemo").write_bytes(whole[:kept])
        with pytest.raises(MinitronError) as caught:
            import_it(tmp_path / "cut.nemo", tmp_path / f"import-{kept}")
        assert "\n" not in str(caught.value)
        assert "copy it anew" in str(caught.value)
    with pytest.raises(ArchitectureError, match="no such file"):
        source_architecture(str(tmp_path / "nowhere.nemo"))


@pytest.mark.parametrize("compression", ["gz", "xz", "bz2"])
def test_a_damaged_compressed_archive_is_told_in_one_line(compression: str, foreign: Foreign, tmp_path: Path) -> None:
    """Without the checksum at its end the members up to the damage, or behind it nonsense, would be taken for the archive's."""
    (foreign.folder / "model_weights.ckpt").write_bytes("".join(f"{number} {number**3}\n" for number in range(40000)).encode())
    archive = foreign.archive(tmp_path / "x.nemo", f"w:{compression}")
    damaged = bytearray(archive.read_bytes())
    damaged[len(damaged) * 3 // 4] ^= 0xFF
    archive.write_bytes(damaged)
    with pytest.raises(ArchitectureError, match="copy it anew") as caught:
        source_architecture(str(archive))
    assert "\n" not in str(caught.value)


# --- what an archive may not do


class Runs:
    """Unpickled, it makes a file: code that somebody put into an archive."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_code_in_pickled_weights_is_not_run(foreign: Foreign, tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in foreign.weights.items()}
    torch.save({**state, "model.decoder.x._extra_state": Runs(tmp_path / "ran")}, foreign.folder / "model_weights.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        import_it(foreign.archive(tmp_path / "x.nemo"), tmp_path / "import")
    assert not (tmp_path / "ran").exists()


def test_code_in_the_metadata_of_a_distributed_checkpoint_is_not_run(foreign: Foreign, tmp_path: Path) -> None:
    (foreign.folder / "model_weights").mkdir()
    (foreign.folder / "model_weights" / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read"):
        import_it(foreign.archive(tmp_path / "x.nemo"), tmp_path / "import")
    assert not (tmp_path / "ran").exists()
    pickle.loads((foreign.folder / "model_weights" / ".metadata").read_bytes())
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize("outside", ["../secret.distcp", "/tmp/secret.distcp"])
def test_a_distributed_checkpoint_reads_no_file_outside_its_folder(
    outside: str, tiny_hf_model: Callable[..., Path], foreign: Foreign, tmp_path: Path
) -> None:
    """Its .metadata names the file of every tensor."""
    with tarfile.open(export_it(import_it(tiny_hf_model("nemotron"), tmp_path / "first"), tmp_path / "export")) as tar:
        tar.extractall(foreign.folder, filter="data")
    file = foreign.folder / "model_weights" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.storage_data = {index: replace(stored, relative_path=outside) for index, stored in metadata.storage_data.items()}
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=rf"asks for the file '{outside}', which is not one of the folder's own"):
        import_it(foreign.archive(tmp_path / "x.nemo"), tmp_path / "import")


def memo_without_content(path: Path) -> None:
    """A pickle that asks for what it has not put away: a KeyError."""
    torch.save({"a": torch.ones(1)}, path)
    with zipfile.ZipFile(path) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w") as broken:
        for name, content in parts.items():
            broken.writestr(name, b"\x80\x02h\x05." if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (memo_without_content, "cannot be read as plain tensors"),
        (lambda path: torch.save({"state_dict": torch.ones(1)}, path), "is missing; is the checkpoint of another model"),
        (lambda path: torch.save({1: torch.ones(1)}, path), "is missing; is the checkpoint of another model"),
    ],
)
def test_pickles_of_another_content_are_told_in_one_line(write: Callable[[Path], None], told: str, foreign: Foreign, tmp_path: Path) -> None:
    write(foreign.folder / "model_weights.ckpt")
    with pytest.raises(CheckpointError, match=told) as caught:
        import_it(foreign.archive(tmp_path / "x.nemo"), tmp_path / "import")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"chunks": [0]}, {"chunks": ["many"]}, {"dimension_separator": "/../../"}, {"dimension_separator": 5}, {"shape": 40}]
)
def test_a_zarr_header_that_no_array_has_is_refused(changes: dict[str, Any], foreign: Foreign, tmp_path: Path) -> None:
    header = write_zarr_checkpoint(foreign) / "model.decoder.final_layernorm.bias" / ".zarray"
    header.write_text(json.dumps({**json.loads(header.read_text()), **changes}))
    with pytest.raises(CheckpointError, match="not an uncompressed zarr array"):
        import_it(foreign.archive(tmp_path / "x.nemo"), tmp_path / "import")


def test_code_in_the_configuration_is_not_run(foreign: Foreign, tmp_path: Path) -> None:
    (foreign.folder / "model_config.yaml").write_text(f"num_layers: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    with pytest.raises(ArchitectureError, match="no plain YAML"):
        source_architecture(str(foreign.archive(tmp_path / "x.nemo")))
    assert not (tmp_path / "ran").exists()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, target
    return found


@pytest.mark.parametrize(
    "bad",
    [
        member("../outside"),
        member("./model_weights/../../outside"),
        member("/outside"),
        member("./model_weights", tarfile.SYMTYPE, "/etc"),
        member("./model_weights/x", tarfile.LNKTYPE, "../../etc/passwd"),
        member("./model_weights/x", tarfile.FIFOTYPE),
    ],
    ids=["parent", "inner parent", "absolute", "symbolic link", "hard link", "fifo"],
)
def test_a_member_that_leaves_the_archive_or_is_no_plain_file_is_refused(bad: tarfile.TarInfo, foreign: Foreign, tmp_path: Path) -> None:
    torch.save({f"model.{name}": tensor for name, tensor in foreign.weights.items()}, foreign.folder / "model_weights.ckpt")
    archive = foreign.archive(tmp_path / "x.nemo")
    with tarfile.open(archive, "a:") as tar:
        tar.addfile(bad)
    before = {path for path in tmp_path.rglob("*") if "x.nemo" not in path.name}
    with pytest.raises(ArchitectureError, match="do not use this file"):
        import_it(archive, tmp_path / "import")
    assert {path for path in tmp_path.rglob("*") if "x.nemo" not in path.name} - before == {tmp_path / "import"}
    assert list((tmp_path / "import").iterdir()) == []


def test_a_configuration_that_would_fill_the_memory_is_refused_unread(tmp_path: Path) -> None:
    """A sparse file of a few blocks that says it holds a tebibyte."""
    huge = member("./model_config.yaml")
    huge.size = 1 << 40
    with (tmp_path / "x.nemo").open("wb") as file:
        file.write(huge.tobuf(tarfile.GNU_FORMAT))
        file.truncate(huge.size + 1024)
    with pytest.raises(ArchitectureError, match=r"model_config\.yaml would have 1,099,511,627,776 bytes; do not use this file"):
        source_architecture(str(tmp_path / "x.nemo"))


def test_nemos_own_connector_opens_what_is_written_here_and_packs_what_is_read_here(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> None:
    """Where the extra `nemo` is installed: NeMo's list, its unpacking, and an archive of its making with the same weights."""
    connector = pytest.importorskip("nemo.core.connectors.save_restore_connector").SaveRestoreConnector
    first = import_it(tiny_hf_model("nemotron"), tmp_path / "first")
    archive = export_it(first, tmp_path / "export")
    assert [member.name for member in connector._filtered_tar_info(str(archive), lambda name: name.endswith(".yaml"))] == ["./model_config.yaml"]
    connector._unpack_nemo_file(str(archive), str(tmp_path / "unpacked"))
    connector._make_nemo_file_from_folder(str(tmp_path / "by_nemo.nemo"), str(tmp_path / "unpacked"))
    again = import_it(tmp_path / "by_nemo.nemo", tmp_path / "again")
    assert again.result["weights_sha256"] == first.result["weights_sha256"]
