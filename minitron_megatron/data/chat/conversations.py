"""Conversations out of .jsonl files: lines that hold {"messages": [{"role": …, "content": …}, …]}."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minitron_megatron.data.corpus import expand, field_of, json_lines, whole_characters
from minitron_megatron.errors import DataError

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


class Conversation(NamedTuple):
    """Messages as the template gets them, the weight of each (of its tokens in the loss), and FILE:LINE."""

    where: str
    messages: list[dict[str, Any]]
    weights: list[float]

    def to_text(self) -> str:
        """One text, as encoders take them."""
        return json.dumps(self)

    @staticmethod
    def from_text(text: str) -> Conversation:
        return Conversation(*json.loads(text))


def expand_chats(globs: Sequence[str]) -> list[Path]:
    """Files of the globs; see corpus.expand. Raises DataError for a file of another kind."""
    files = expand(globs)
    for file in files:
        if not file.name.endswith(ENDINGS):
            raise DataError(f"{file}: chat.train takes {', '.join(ENDINGS)} with one conversation a line")
    return files


def conversations(path: Path, messages_field: str) -> Iterator[str]:
    """Every conversation of a file as Conversation.to_text; raises DataError with file and line for what is none."""
    for where, record in json_lines(path):
        messages = field_of(record, messages_field, where, "chat.messages_field")
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}: '{messages_field}' is no list of messages")
        checked = [_checked(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)]
        yield Conversation(where, [message for message, _ in checked], [weight for _, weight in checked]).to_text()


def _checked(message: Any, where: str) -> tuple[dict[str, Any], float]:
    """Role and content are texts, `weight` (of an answer in the loss, 1 by default) a number ≥ 0; other keys are the template's business."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
        raise DataError(f'{where} is not of the form {{"role": "user", "content": "…"}}')
    weight = message.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise DataError(f"{where}: weight {weight!r} is no number of 0 or more")
    rest = {key: value for key, value in message.items() if key != "weight"}
    return {**rest, "content": whole_characters(message["content"])}, float(weight)
