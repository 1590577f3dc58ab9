"""Tokenizers: what is read, what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_megatron.data.tokenizer import load_tokenizer, tokenizer_files
from minitron_megatron.errors import DataError


def test_hugging_face_ids_are_whole_documents_without_special_tokens(hf_folder: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(hf_folder)
    encoded = tokenizer.encode_batch(texts)
    # decoding gives the text back: nothing was truncated to the 5 tokens that tokenizer.json asks for
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert all(tokenizer.eod not in ids for ids in encoded)
    assert tokenizer.eod == 0 and max(max(ids) for ids in encoded) < tokenizer.vocab_size
    assert tokenizer.digest == hashlib.sha256((hf_folder / "tokenizer.json").read_bytes()).hexdigest()


def test_sentencepiece_ids_equal_the_library_and_end_of_document_is_its_eos(sentencepiece_file: Path, texts: list[str]) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    tokenizer = load_tokenizer(sentencepiece_file)
    assert tokenizer.encode_batch(texts) == [reference.encode(text) for text in texts]
    assert (tokenizer.eod, tokenizer.vocab_size) == (reference.eos_id(), 80)
    assert tokenizer.exact_vocabulary


def test_ids_that_only_pad_the_embeddings_are_left_out_of_a_text(sentencepiece_file: Path) -> None:
    """A model with 128 rows for 80 pieces may give them; the library itself raises IndexError."""
    tokenizer = load_tokenizer(sentencepiece_file)
    ids = tokenizer.encode("every county")
    assert tokenizer.decode([80, *ids, 127]) == tokenizer.decode(ids) == "every county"


def test_a_folder_with_tokenizer_model_alone_is_sentencepiece(sentencepiece_file: Path, tmp_path: Path) -> None:
    shutil.copy(sentencepiece_file, tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).digest == load_tokenizer(sentencepiece_file).digest


def test_a_folder_without_tokenizer_json_goes_through_transformers(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {"<|endoftext|>": 0} | {letter: number for number, letter in enumerate(alphabet, start=1)}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("ab") == [ids["a"], ids["b"]] and tokenizer.eod == 0


def test_a_pickled_tokenizer_encodes_alike(hf_folder: Path, sentencepiece_file: Path) -> None:
    for path in (hf_folder, sentencepiece_file):
        tokenizer = load_tokenizer(path)
        assert pickle.loads(pickle.dumps(tokenizer)).encode("every county") == tokenizer.encode("every county")


def test_eos_is_found_by_number_in_the_model_settings(hf_folder: Path, tmp_path: Path) -> None:
    shutil.copy(hf_folder / "tokenizer.json", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_tokenizer(tmp_path).eod == 7
    assert [file.name for file in tokenizer_files(tmp_path)] == ["tokenizer.json", "generation_config.json"]


def test_users_mistakes_are_data_errors(hf_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer here"):
        load_tokenizer(tmp_path)
    shutil.copy(hf_folder / "tokenizer.json", tmp_path)
    with pytest.raises(DataError, match=r"no end-of-sequence token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.model").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"broken.model: cannot be read"):
        load_tokenizer(tmp_path / "broken.model")


def test_a_worker_process_imports_neither_torch_nor_megatron() -> None:
    heavy = ("torch", "megatron", "transformers")
    code = f"import sys, minitron_megatron.data.encode; print([name for name in {heavy} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
