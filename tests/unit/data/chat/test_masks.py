"""Which tokens of a conversation count: against masks made by hand, and transformers' own where the template marks answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from minitron_megatron.data.chat.conversations import Conversation
from minitron_megatron.data.chat.encoder import ChatEncoder
from minitron_megatron.data.chat.template import load_template
from minitron_megatron.data.encode import EncodedBlock
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import DataError

from .conftest import CONVERSATIONS, FORGETFUL, MARKED, Messages, turns


def encoded(folder: Path, conversations: list[Messages], template: str = "auto", weights: list[list[float]] | None = None) -> EncodedBlock:
    tokenizer = load_tokenizer(folder)
    encoder = ChatEncoder(tokenizer, load_template(template, folder, {}), "uint16")
    of_each = weights or [[1.0] * len(messages) for messages in conversations]
    texts = [Conversation(f"a.jsonl:{n}", m, w).to_text() for n, (m, w) in enumerate(zip(conversations, of_each, strict=True), start=1)]
    return encoder.encode(texts)


def split(block: EncodedBlock) -> list[tuple[list[int], list[float]]]:
    ends = np.cumsum(block.lengths)[:-1]
    assert block.weights is not None
    return [(a.tolist(), b.tolist()) for a, b in zip(np.split(block.tokens, ends), np.split(block.weights, ends), strict=True)]


def test_ids_and_mask_of_an_unmarked_template_are_those_made_by_hand(chat_folder: Path) -> None:
    """The closing mark of an answer counts, the role line that the prompt gives does not."""
    tokenizer = load_tokenizer(chat_folder)
    for messages, (ids, weights) in zip(CONVERSATIONS, split(encoded(chat_folder, CONVERSATIONS)), strict=True):
        pieces = [] if messages[0]["role"] == "system" else [("<|im_start|>system\nbe kind<|im_end|>\n", 0)]
        for message in messages:
            pieces.append((f"<|im_start|>{message['role']}\n", 0))
            pieces.append((f"{message['content']}<|im_end|>\n", int(message["role"] == "assistant")))
        assert ids == tokenizer.encode("".join(text for text, _ in pieces))
        if "\n" in "".join(message["content"] for message in messages):
            continue  # a token across the border: the next test
        expected = [counts for text, counts in pieces for _ in tokenizer.encode(text)]
        assert weights == expected


def test_a_token_across_the_border_belongs_to_the_answer(chat_folder: Path) -> None:
    """The role line ends in a line end and the answer begins with one: one token, and the answer's first. Left out, it would never be learned."""
    messages = turns("hm", "\n\nwith work")
    (ids, weights), *_ = split(encoded(chat_folder, [messages]))
    tokenizer = load_tokenizer(chat_folder)
    both = tokenizer.encode("\n\n")
    assert len(both) == 1, "the fixture's tokenizer has to merge line ends"
    place = max(n for n, token in enumerate(ids) if token == both[0])
    assert weights[place - 1 : place + 1] == [0, 1] and set(weights[place:]) == {1}


def test_marked_answers_are_those_that_transformers_marks(chat_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "marked"
    shutil.copytree(chat_folder, folder)
    (folder / "chat_template.jinja").write_text(MARKED)
    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    for messages, (ids, weights) in zip(CONVERSATIONS, split(encoded(folder, CONVERSATIONS)), strict=True):
        expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == expected["input_ids"]
        if "\n" not in "".join(message["content"] for message in messages):  # a border within a token: see above
            assert weights == expected["assistant_masks"]
    assert any("\n" not in m[-1]["content"] and len(m) > 2 for m in CONVERSATIONS)


def test_the_template_is_found_where_transformers_keeps_it(chat_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(chat_folder, folder)
    held = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for value in (held, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": held}]):
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": value}))
        assert load_template("auto", folder, {}).jinja == held
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"no chat template; name a file of Jinja text in chat\.template"):
        load_template("auto", folder, {})
    own = tmp_path / "own.jinja"
    own.write_text("{{ eos_token }}{{ bos_token }}{{ date }}")
    assert load_template(str(own), folder, {"date": "today"}).render(turns("x"))[0] == "<|im_end|><eos>today"


def test_a_message_weight_scales_its_answer_alone(chat_folder: Path) -> None:
    messages = CONVERSATIONS[1]
    (_, plain), *_ = split(encoded(chat_folder, [messages]))
    (_, scaled), *_ = split(encoded(chat_folder, [messages], weights=[[1.0, 1.0, 0.25, 1.0, 3.0]]))
    assert sorted(set(scaled)) == [0, 0.25, 3]
    assert [weight > 0 for weight in scaled] == [weight > 0 for weight in plain]
    assert scaled.index(0.25) < scaled.index(3)


def test_a_template_whose_beginnings_change_is_refused_with_the_place_and_the_reason(chat_folder: Path, tmp_path: Path) -> None:
    forgetful = tmp_path / "forgetful.jinja"
    forgetful.write_text(FORGETFUL)
    harmless, thoughtful = turns("a", "b"), turns("a", "<think>c</think>b", "d", "e")
    encoded(chat_folder, [harmless], str(forgetful))
    with pytest.raises(DataError, match=r"a\.jsonl:2: the chat template .*forgetful\.jinja renders the first 2 messages otherwise .* generation"):
        encoded(chat_folder, [harmless, thoughtful], str(forgetful))


def test_a_template_that_refuses_a_conversation_is_told_with_its_own_words(chat_folder: Path, tmp_path: Path) -> None:
    strict = tmp_path / "strict.jinja"
    strict.write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template .*strict\.jinja fails on 2 messages: .*roles must alternate"):
        encoded(chat_folder, [turns("a", "b")], str(strict))
