"""The chat stage as a whole: what it publishes, resumes and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from minitron_megatron.artifact import Artifact, write_json
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data import index
from minitron_megatron.data.answers import answer_samples, heldout_answers
from minitron_megatron.data.batches import collate
from minitron_megatron.data.chat import stage
from minitron_megatron.data.chat.encoder import ChatEncoder
from minitron_megatron.data.encode import EncodedBlock
from minitron_megatron.data.tokenizer import load_tokenizer
from minitron_megatron.errors import DataError

from .conftest import CONVERSATIONS, turns

LENGTH = 64


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """40 conversations, of which every tenth has no answer, in a plain and a packed file."""
    lines = [
        json.dumps({"messages": CONVERSATIONS[2] if number % 10 == 0 else turns(f"what is {number}?", f"it is {number} " * (number % 7 + 1))})
        for number in range(40)
    ]
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "a.jsonl").write_text("\n".join(lines[:25]) + "\n\n")
    (tmp_path / "chats" / "b.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines[25:]).encode()))
    return tmp_path / "chats"


@pytest.fixture
def imported(chat_folder: Path, tmp_path: Path) -> Artifact:
    folder = tmp_path / "import"
    shutil.copytree(chat_folder, folder / "tokenizer")
    write_json(folder / "result.json", {"architecture": {"vocab": 384}})
    return Artifact(folder, {"id": "x"})


def recipe(chats: Path, **chat: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"path": "unused"},
            "data": {"train": ["unused"]},
            "chat": {"train": [f"{chats}/*"], "heldout_conversations": 5, "sequence_length": LENGTH, "workers": 1, **chat},
            "prune": {"target": {"ffn": 8}},
            "distill": {"steps": 100},
        }
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_parts_hold_every_conversation_in_order_with_a_weight_for_each_token(chats: Path, imported: Artifact, tmp_path: Path) -> None:
    result = stage.run(recipe(chats), {"import": imported}, tmp_path / "out")
    tokenizer = load_tokenizer(imported.path / "tokenizer")
    train, weights = (IndexedDataset(str(tmp_path / "out" / name)) for name in ("train", "train-weights"))
    assert (len(train), len(IndexedDataset(str(tmp_path / "out" / "heldout")))) == (35, 5)
    assert sorted(contents(tmp_path / "out")) == sorted(f"{a}{b}.{c}" for a in ("train", "heldout") for b in ("", "-weights") for c in ("bin", "idx"))
    for number in (1, 24, 25, 34):  # across both files
        answer = "".join(tokenizer.decode([token]) for token, weight in zip(train[number], weights[number], strict=True) if weight)
        assert answer == f"it is {number} " * (number % 7 + 1) + "\n"
    part = result["parts"]["train"]
    assert (part["documents"], part["without_answer"], part["cut"]) == (35, 4, sum(len(train[n]) > LENGTH + 1 for n in range(35) if n % 10))
    assert part["cut"] > 0 and part["answer_tokens"] > 100
    assert "4 without an answer left out" in result["summary"]


def test_two_workers_and_an_interruption_leave_the_same_bytes(
    chats: Path, imported: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = index.encode_files
    monkeypatch.setattr(index, "encode_files", lambda *args, **options: original(*args, **options, block_characters=700))
    stage.run(recipe(chats), {"import": imported}, tmp_path / "one")
    stage.run(recipe(chats, workers=2), {"import": imported}, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    calls: list[int] = []
    encode = ChatEncoder.encode

    def count_and_break(encoder: ChatEncoder, texts: list[str]) -> EncodedBlock:
        calls.append(len(texts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(encoder, texts)

    monkeypatch.setattr(ChatEncoder, "encode", count_and_break)
    with pytest.raises(KeyboardInterrupt):
        stage.run(recipe(chats), {"import": imported}, tmp_path / "resumed")
    stage.run(recipe(chats), {"import": imported}, tmp_path / "resumed")
    assert contents(tmp_path / "one") == contents(tmp_path / "resumed")
    assert sum(calls) - calls[3] == 40 and len(calls) > 6  # each conversation once but for the block that broke


def test_batches_count_the_answers_that_the_summary_counts(chats: Path, imported: Artifact, tmp_path: Path) -> None:
    result = stage.run(recipe(chats), {"import": imported}, tmp_path / "out")
    part = result["parts"]["train"]
    training = answer_samples(tmp_path / "out" / "train", samples=part["samples"], sequence_length=LENGTH, seed=3)
    batch = collate(training, range(len(training)))
    assert batch.tokens_BS.shape == (part["samples"], LENGTH)
    assert int((batch.loss_mask_BS > 0).sum()) == part["answer_tokens"]
    tokenizer = load_tokenizer(imported.path / "tokenizer")
    spoken = tokenizer.decode(batch.labels_BS[batch.loss_mask_BS > 0].tolist())
    assert "what" not in spoken and "it is 13" in spoken
    assert torch.equal(batch.tokens_BS[:, 1:], batch.labels_BS[:, :-1])
    held = heldout_answers(tmp_path / "out" / "heldout", sequence_length=LENGTH, at_most=100)
    assert len(held) == result["parts"]["heldout"]["samples"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": "hi"}', r"'messages' is no list of messages"),
        ('{"conversations": []}', r"no field 'messages' \(found: conversations\); name the right one in chat\.messages_field"),
        ('{"messages": [{"from": "human", "value": "x"}]}', r"message 1 is not of the form"),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', r"message 1 is not of the form"),
        ('{"messages": [{"role": "user", "content": "x", "weight": -1}]}', r"message 1: weight -1 is no number of 0 or more"),
        ("{", r"broken JSON"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(chats: Path, imported: Artifact, tmp_path: Path, line: str, reason: str) -> None:
    (chats / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n' + line)
    with pytest.raises(DataError, match=rf"c\.jsonl:2: {reason}"):
        stage.run(recipe(chats), {"import": imported}, tmp_path / "out")


def test_files_that_shape_the_result_are_known(chats: Path) -> None:
    template = chats.parent / "own.jinja"
    template.write_text("x")
    assert {file.name for file in stage.outside_files(recipe(chats, template=str(template)))} == {"a.jsonl", "b.jsonl.zst", "own.jinja"}
    with pytest.raises(DataError, match=r"own\.jinja: .*one conversation a line|own\.jinja: unknown kind"):
        stage.outside_files(recipe(chats, train=[str(template)]))
    with pytest.raises(DataError, match=r"chat\.train takes \.jsonl"):
        (chats / "d.txt").write_text("x")
        stage.outside_files(recipe(chats))


@pytest.mark.parametrize("end", ["</s>", "{{ eos_token }}"])
def test_a_template_whose_marks_sentencepiece_would_spell_out_is_refused(chats: Path, sentencepiece_file: Path, tmp_path: Path, end: str) -> None:
    """Of tokenizer.model alone `</s>` in a text is four letters and no end; as tokenizer.json it is one id."""
    (tmp_path / "import" / "tokenizer").mkdir(parents=True)
    shutil.copy(sentencepiece_file, tmp_path / "import" / "tokenizer" / "tokenizer.model")
    (tmp_path / "import" / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    write_json(tmp_path / "import" / "result.json", {"architecture": {"vocab": 384}})
    imported, template = Artifact(tmp_path / "import", {"id": "x"}), tmp_path / "own.jinja"
    body = "{% for m in messages %}{{ m.role }}: {{ m.content }}END\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    template.write_text(body.replace("END", end))
    with pytest.raises(DataError, match=r"own\.jinja writes </s>, which SentencePiece \(.*\) takes for letters; name a folder"):
        stage.run(recipe(chats, template=str(template)), {"import": imported}, tmp_path / "refused")
    template.write_text(body.replace("END", "."))
    assert stage.run(recipe(chats, template=str(template)), {"import": imported}, tmp_path / "out")["parts"]["train"]["answer_tokens"] > 0


def test_conversations_without_an_answer_in_reach_are_refused(imported: Artifact, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": CONVERSATIONS[2]}) + "\n") * 3)
    with pytest.raises(DataError, match="none of 2 texts has an answer within 64 tokens"):
        stage.run(recipe(tmp_path, train=[f"{tmp_path}/a.jsonl"], heldout_conversations=1), {"import": imported}, tmp_path / "out")
    with pytest.raises(DataError, match=r"chat\.heldout_conversations=3 leaves nothing to train on: chat\.train holds 3 conversation"):
        stage.run(recipe(tmp_path, train=[f"{tmp_path}/a.jsonl"], heldout_conversations=3), {"import": imported}, tmp_path / "out")
