"""A model whose tokenizer is a SentencePiece .model alone: its ids stay the same in transformers and in .nemo archives."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_nemo import export_it, import_it, recipe

from minitron_megatron.arch.source import source_architecture, source_config
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.convert import import_stage
from minitron_megatron.convert.fast_tokenizer import add_fast_tokenizer
from minitron_megatron.errors import DataError

SENTENCES = ["The state of our union is strong, and the people of every county", "have built it with work: 1,776 of them."] * 20
KINDS = [*itertools.product(("bpe", "unigram"), (True, False), ("nmt_nfkc", "identity"), (True, False), (True, False))]
STRANGE = ["Every county — 東京\tnaïve café", "  two  blanks\nand lines ", "work work\u00a0work ﬁne", "x" * 50]


def train(
    kind: str = "bpe", byte_fallback: bool = True, rule: str = "nmt_nfkc", squeeze: bool = True, blank_ahead: bool = True, **more: Any
) -> bytes:
    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=trained,
        vocab_size=300 if byte_fallback else 60,
        model_type=kind,
        byte_fallback=byte_fallback,
        normalization_rule_name=rule,
        remove_extra_whitespaces=squeeze,
        add_dummy_prefix=blank_ahead,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"bos_id": 2, "eos_id": 3, "unk_id": 0, "pad_id": -1, **more},
    )
    return trained.getvalue()


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: "-".join(map(str, settings)))
def test_tokenizer_json_gives_the_ids_of_the_library(settings: tuple[Any, ...], tmp_path: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(train(*settings))
    assert add_fast_tokenizer(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SENTENCES[:2], *STRANGE]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == library.encode(text), text
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (3, 2, library.get_piece_size())


def test_a_tokenizer_of_words_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train("word", False))
    assert not add_fast_tokenizer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_a_tokenizer_model_of_another_kind_travels_as_it_is(tmp_path: Path) -> None:
    """Llama 3's own tokenizer.model is tiktoken's: lines of base64. An export that fails there has trained for nothing."""
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    assert not add_fast_tokenizer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize("ends", [(), ("bos",), ("bos", "eos")])
def test_the_tokens_that_the_settings_put_around_a_text_are_put_there(ends: tuple[str, ...], tmp_path: Path) -> None:
    """transformers reads the source so, and a student must not begin its texts otherwise."""
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(train())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", **{f"add_{end}_token": True for end in ends}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text, other = "The state", "of work"
    expected = AutoTokenizer.from_pretrained(tmp_path)
    ids, pair = expected(text)["input_ids"], expected(text, other)["input_ids"]
    assert [ids.count(2), ids.count(3)] == [int("bos" in ends), int("eos" in ends)]
    assert add_fast_tokenizer(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert (found(text)["input_ids"], found(text, other)["input_ids"]) == (ids, pair)


@pytest.fixture
def source(tiny_hf_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A nemotron of 300 ids with tokenizer.model as its only tokenizer."""
    folder = Path(shutil.copytree(tiny_hf_model("nemotron", vocab_size=300), tmp_path / "source"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer.model").write_bytes(train())
    return folder


def test_the_export_has_the_model_file_and_transformers_reads_the_same_ids(source: Path, tmp_path: Path) -> None:
    import sentencepiece
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = export_it(import_it(source, tmp_path / "import"), tmp_path / "export", "huggingface")
    assert (model / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    library, theirs = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model")), AutoTokenizer.from_pretrained(model)
    for text in [*SENTENCES[:2], *STRANGE]:
        ids = theirs(text)["input_ids"]
        assert ids == library.encode(text)
        assert theirs.decode(ids) == library.decode(ids)
    tokens = torch.tensor([theirs(SENTENCES[0])["input_ids"]])
    with torch.no_grad():
        actual, expected = (AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (model, source))
    assert torch.equal(actual, expected)


def test_a_model_file_that_lies_elsewhere_is_imported_and_belongs_to_the_artifacts_identity(source: Path, tmp_path: Path) -> None:
    elsewhere = (source / "tokenizer.model").rename(tmp_path / "other_name.model")
    asked = recipe(source)
    asked = asked.model_copy(update={"model": asked.model.model_copy(update={"tokenizer": str(elsewhere)})})
    assert elsewhere in import_stage.outside_files(asked)
    import_stage.run(asked, {}, tmp_path / "import")
    assert (tmp_path / "import" / "tokenizer" / "tokenizer.model").read_bytes() == elsewhere.read_bytes()
    elsewhere.unlink()
    with pytest.raises(DataError, match=r"model\.tokenizer=.*other_name\.model: no such file or folder"):
        import_stage.run(asked, {}, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_an_archive_holds_the_model_file_as_nemo_names_it(source: Path, tmp_path: Path) -> None:
    first = import_it(source, tmp_path / "import")
    archive = export_it(first, tmp_path / "export")
    with tarfile.open(archive) as tar:
        file = tar.extractfile("./model_config.yaml")
        assert file is not None
        section = yaml.safe_load(file.read())["tokenizer"]
        kept = tar.extractfile(f"./{section['model'].removeprefix('nemo:')}")
        assert kept is not None and kept.read() == (source / "tokenizer.model").read_bytes()
    assert section["library"] == "sentencepiece"
    again = import_it(archive, tmp_path / "again")
    assert again.result["weights_sha256"] == first.result["weights_sha256"]
    assert [path.name for path in (again.path / "tokenizer").iterdir()] == ["tokenizer.model"]
    config = source_config(str(archive))
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (2, 3, 300)


def test_a_padded_vocabulary_that_the_archive_does_not_name_follows_from_its_tokenizer(source: Path, tmp_path: Path) -> None:
    """300 pieces, a multiple of 64 over 2 tensor ranks: 384 rows, as NeMo makes them; nothing of them is lost."""
    from test_nemo import Foreign

    foreign = Foreign(source, tmp_path / "foreign", tokenizer="tokenizer.model")
    section = {"library": "sentencepiece", "tokenizer_model": "nemo:abc_tokenizer.model"}
    (foreign.folder / "abc_tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    foreign.configure(tokenizer=section, override_vocab_size=None, make_vocab_size_divisible_by=64, tensor_model_parallel_size=2)
    reader = HuggingFaceSource(source, foreign.arch)
    state = {f"model.{row.name}": reader.read(row) for row in tensor_table(foreign.arch)}
    for name in ("model.embedding.word_embeddings.weight", "model.output_layer.weight"):
        state[name] = torch.cat([state[name], torch.randn(84, 40)])
    torch.save(state, foreign.folder / "model_weights.ckpt")
    archive = foreign.archive(tmp_path / "x.nemo")
    assert source_architecture(str(archive)).vocab == 384
    model = export_it(import_it(archive, tmp_path / "import"), tmp_path / "export", "huggingface")
    from safetensors.torch import load_file

    assert torch.equal(load_file(model / "model.safetensors")["lm_head.weight"], state["model.output_layer.weight"])
