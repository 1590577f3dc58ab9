"""Conversations → token ids, and for each token its weight in the loss: 0 but where the assistant wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from minitron_megatron.data.chat.conversations import Conversation
from minitron_megatron.data.chat.template import ChatTemplate, Span
from minitron_megatron.data.encode import EncodedBlock
from minitron_megatron.data.tokenizer import Tokenizer
from minitron_megatron.errors import DataError


@dataclass(frozen=True)
class ChatEncoder:
    """The whole text of a conversation is tokenized at once, as transformers' apply_chat_template does; nothing is added behind it.

    The weight of a conversation's first token is 0: nothing of its own stands before it.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    dtype: str

    @property
    def digest(self) -> str:
        return f"{self.tokenizer.digest} {self.template.digest}"

    def encode(self, texts: list[str]) -> EncodedBlock:
        """texts: of Conversation.to_text. Raises DataError with file and line where the template cannot be used."""
        encoded = [self._conversation(Conversation.from_text(text)) for text in texts]
        return EncodedBlock(
            np.concatenate([np.array(ids, dtype=self.dtype) for ids, _ in encoded]),
            np.array([len(ids) for ids, _ in encoded], dtype=np.int32),
            np.concatenate([weights for _, weights in encoded]),
        )

    def _conversation(self, held: Conversation) -> tuple[list[int], NDArray[np.float32]]:
        try:
            text, spans = self.template.render(held.messages)
            turn_weights = _weights_of_spans(held, spans)
        except DataError as error:
            raise DataError(f"{held.where}: {error}") from None
        ends = list(chain.from_iterable(spans))
        ids, *beginnings = self.tokenizer.encode_batch([text, *(text[:end] for end in ends)])
        places = [_common(beginning, ids) for beginning in beginnings]
        weights = np.zeros(len(ids), dtype=np.float32)
        for weight, begin, end in zip(turn_weights, places[::2], places[1::2], strict=True):
            weights[begin:end] = weight
        weights[:1] = 0
        return ids, weights


def _common(beginning: Sequence[int], whole: Sequence[int]) -> int:
    """How many ids the beginning of a text shares with the whole: a token across the border belongs to what follows."""
    pairs = enumerate(zip(beginning, whole, strict=False))
    return next((place for place, (mine, theirs) in pairs if mine != theirs), min(len(beginning), len(whole)))


def _weights_of_spans(held: Conversation, spans: list[Span]) -> list[float]:
    """Of the assistant's messages, in order. A template may mark other spans; it is then not known which weight is whose."""
    weights = [weight for message, weight in zip(held.messages, held.weights, strict=True) if message["role"] == "assistant"]
    if len(weights) == len(spans):
        return weights
    if set(held.weights) - {1.0}:
        raise DataError(f"the chat template marks {len(spans)} answers of {len(weights)} assistant messages, so that their weights cannot be used")
    return [1.0] * len(spans)
