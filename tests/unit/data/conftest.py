"""Tiny tokenizers and corpora, made once per session; nothing here needs the network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minitron_megatron.platform import activate

activate("cpu")

SENTENCE = "the state of our union is strong and the people of every county have built it with work"
WORDS = SENTENCE.split()


def document(number: int) -> str:
    """A text of its own: no two numbers give the same, and lengths differ."""
    chosen = [WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(20 + number % 13)]
    return f"document {number}: " + " ".join(chosen) + f" — no. {number * 31} é"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [document(number) for number in range(40)]


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A byte-level BPE with eos 0; its tokenizer.json carries a truncation to 5 tokens, as saved ones at times do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("hf")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False),
    )
    bpe.enable_truncation(5)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    return folder


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    import sentencepiece

    prefix = tmp_path_factory.mktemp("sp") / "tiny"
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_prefix=str(prefix), vocab_size=80, minloglevel=2)
    return prefix.with_suffix(".model")


@pytest.fixture
def text_files(tmp_path: Path, texts: list[str]) -> list[Path]:
    folder = tmp_path / "text"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text)
    return sorted(folder.iterdir())
