"""Curves of text: tokens on disk, the order of samples, packing, conversations."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers
import transformers.utils.chat_template_utils  # noqa: F401 - seconds that are no part of a point
from growth.curve import Curve, Work
from tokenizers import decoders, models, pre_tokenizers, trainers

from minitron_megatron.data.chat.conversations import Conversation
from minitron_megatron.data.chat.encoder import ChatEncoder
from minitron_megatron.data.chat.template import ChatTemplate
from minitron_megatron.data.encode import EncodedBlock
from minitron_megatron.data.index import split_and_merge, tokenize, write_block
from minitron_megatron.data.packing import Rule, pack
from minitron_megatron.data.samples import packed_samples
from minitron_megatron.data.tokenizer import Tokenizer, load_tokenizer

WORDS = [f"{start}{end}" for start in ("str", "pl", "un", "ver", "mo", "cr") for end in ("ong", "ite", "eer", "al", "ound", "ip")]
BLOCK_CHARACTERS = 100_000
"""Less than the stage's own, so that there are many blocks."""
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
WHY_TURNS = "an answer's place is found by rendering and tokenizing the conversation up to it, once for each answer; turns are few"


def _tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE of the words above."""
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        [" ".join(WORDS)] * 4, trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    )
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    return load_tokenizer(folder)


def tokenized(size: int, folder: Path, *, quantity: str) -> Work:
    """Text files to the merged train and held-out parts, in this process."""
    documents, words = (size, 100) if quantity == "documents" else (40, size)
    draw = random.Random(0)
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(documents):
            file.write(json.dumps({"text": " ".join(draw.choices(WORDS, k=words))}) + "\n")
    tokenizer = _tokenizer(folder / "tokenizer")

    def work() -> None:
        shutil.rmtree(folder / "blocks", ignore_errors=True)
        blocks = tokenize([folder / "text.jsonl"], tokenizer, folder / "blocks", text_field="text", workers=1, block_characters=BLOCK_CHARACTERS)
        split_and_merge(blocks, folder, heldout_documents=10)

    return work


def ordered(size: int, folder: Path) -> Work:
    """The shuffled order of an epoch's samples."""
    lengths = np.full(size, 20, dtype=np.int32)
    write_block(folder / "train", EncodedBlock(np.zeros(20 * size, dtype=np.uint16), lengths))

    def work() -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        packed_samples(folder / "train", samples=20 * size // 65, sequence_length=64, seed=1, cache=folder / "cache", repeat=False)

    return work


def packed(size: int, folder: Path, *, rule: Rule) -> Work:
    lengths = np.random.default_rng(0).integers(20, 4096, size)
    return lambda: pack(np.arange(size), lengths, 4096, rule)


def chat(size: int, folder: Path, *, quantity: str) -> Work:
    """Conversations encoded with their weights, by a template that does not mark its answers."""
    conversations, turns = (size, 4) if quantity == "conversations" else (2, size)
    text = " ".join(WORDS)
    pair = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    encoder = ChatEncoder(_tokenizer(folder / "tokenizer"), ChatTemplate(folder, TEMPLATE, {}), "uint16")
    messages = pair * (turns // 2)
    texts = [Conversation(messages=messages, weights=[1.0] * len(messages), where="here").to_text()] * conversations
    return lambda: encoder.encode(texts)


CURVES = [
    Curve("data", "documents", (1000, 2000, 4000, 8000, 16000), partial(tokenized, quantity="documents")),
    Curve("data", "words of a document", (500, 2000, 8000, 32000), partial(tokenized, quantity="words")),
    Curve("order of samples", "documents", (5000, 20000, 80000, 320000), ordered),
    Curve("packing, best fit", "texts", (10000, 30000, 100000, 300000), partial(packed, rule="best_fit")),
    Curve("packing, sequential", "texts", (10000, 30000, 100000, 300000), partial(packed, rule="sequential")),
    Curve("chat", "conversations", (32, 64, 128, 256), partial(chat, quantity="conversations")),
    Curve("chat", "turns", (8, 16, 32, 64, 128), partial(chat, quantity="turns"), WHY_TURNS),
]
