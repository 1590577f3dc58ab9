"""A tokenizer with the marks of ChatML, its templates, and conversations of several kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

# SmolLM2's own template but for its sentence: a system message of its own where the conversation has none
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)
# as some reasoning models do: thoughts of earlier turns are dropped once there is a later one
FORGETFUL = CHATML.replace("message['content'] +", "(message['content'] if loop.last else message['content'].split('</think>')[-1]) +")
Messages = list[dict[str, Any]]


def turns(*contents: str, system: str = "") -> Messages:
    """user, assistant, user, …"""
    spoken = [{"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *spoken] if system else spoken


CONVERSATIONS = [
    turns("how strong is the state?", "it is strong"),
    turns("who built it?", "the people of every county", "with what?", "\n\nwith work é東", system="be short"),
    turns("nobody answers"),
    turns("hi", "", "and?", "of every county have built it with work " * 4),
]


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("chat")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [message["content"] for messages in CONVERSATIONS for message in messages] + ["\n\n\n system user assistant"] * 9
    special = ["<eos>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False))
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": {"__type": "AddedToken", "content": "<eos>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder
