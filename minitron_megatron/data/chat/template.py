"""A tokenizer's own chat template: messages → text, and which parts of it the assistant wrote.

Rendered by transformers' function (its sandbox, its filters, its generation marks), without its tokenizer classes and without torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_megatron.data.tokenizer import special_tokens
from minitron_megatron.errors import DataError

Message = Mapping[str, Any]
Span = tuple[int, int]
"""First character and the one behind the last."""
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ChatTemplate:
    """Jinja text and what it may name: special tokens and the recipe's own arguments."""

    source: Path
    jinja: str
    arguments: dict[str, Any]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.jinja, self.arguments], sort_keys=True).encode()).hexdigest()

    def writes(self, token: str) -> bool:
        """Whether its own text has the token, or names an argument that is the token."""
        names = [re.escape(name) for name, value in self.arguments.items() if value == token]
        return token in self.jinja or any(re.search(rf"\b{name}\b", self.jinja) for name in names)

    def render(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The conversation's text, and the parts of it that the assistant writes.

        Where the template marks them ({% generation %}): as marked. Else what each assistant message adds to the text of those before it
        with the generation prompt: what the model would have to write, its closing marks included.
        Raises DataError where the template fails, or where a conversation's beginning is rendered otherwise than within the whole.
        """
        if GENERATION_MARK.search(self.jinja):
            return self._call(messages, marked=True)
        whole = self._call(messages)[0]
        turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        return whole, [self._added(messages, place, whole) for place in turns]

    def _added(self, messages: Sequence[Message], place: int, whole: str) -> Span:
        before = self._call(messages[:place], prompt=True)[0]
        after = self._call(messages[: place + 1])[0]
        for beginning, what in ((after, f"the first {place + 1} messages"), (before, f"the prompt for message {place + 1}")):
            if not whole.startswith(beginning):
                raise DataError(
                    f"the chat template {self.source} renders {what} otherwise than within the whole conversation, so that the answer cannot be "
                    "told apart from its context; put {% generation %} marks into a copy of it and name that in chat.template"
                )
        return len(before), len(after)

    def _call(self, messages: Sequence[Message], *, prompt: bool = False, marked: bool = False) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                chat_template=self.jinja,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **self.arguments,
            )
        except Exception as error:  # whatever a template does to messages that it was not written for
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"the chat template {self.source} fails on {len(messages)} messages: {type(error).__name__}: {reason}") from None
        return texts[0], spans[0] if marked else []


def load_template(named: str, tokenizer: Path, arguments: Mapping[str, Any]) -> ChatTemplate:
    """named: "auto" for the tokenizer's own, else a file of Jinja text. Raises DataError where there is none."""
    if named == "auto":
        return ChatTemplate(*_own_template(tokenizer), {**special_tokens(tokenizer), **arguments})
    if not Path(named).is_file():
        raise DataError(f"chat.template={named}: no such file; name a file of Jinja text, or auto for the tokenizer's own")
    return ChatTemplate(Path(named), Path(named).read_text(), {**special_tokens(tokenizer), **arguments})


def _own_template(tokenizer: Path) -> tuple[Path, str]:
    """From the files that transformers looks into, in its order; of several named templates the default."""
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    for file in (folder / name for name in FILES):
        found = _template_in(file) if file.is_file() else None
        if found:
            return file, found
    raise DataError(f"{tokenizer}: the tokenizer has no chat template; name a file of Jinja text in chat.template")


def _template_in(file: Path) -> str | None:
    if file.suffix == ".jinja":
        return file.read_text()
    held = json.loads(file.read_text()).get("chat_template")
    return {item["name"]: item["template"] for item in held}.get("default") if isinstance(held, list) else held
