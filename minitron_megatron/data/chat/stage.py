"""The `chat` stage: conversations → train and heldout indexed datasets with a weight for each token."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minitron_megatron.artifact import Artifact, require_disk_space
from minitron_megatron.config.chat import Chat
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.chat.conversations import conversations, expand_chats
from minitron_megatron.data.chat.encoder import ChatEncoder
from minitron_megatron.data.chat.template import ChatTemplate, load_template
from minitron_megatron.data.tokenizer import Tokenizer, tokenizer_files
from minitron_megatron.data.vocabulary import model_tokenizer
from minitron_megatron.errors import DataError


def outside_files(recipe: Recipe) -> list[Path]:
    """Every file that this stage reads outside its input artifacts; raises DataError for one that is not there."""
    chat = chat_section(recipe)
    template = [Path(chat.template)] if chat.template != "auto" and Path(chat.template).is_file() else []
    own_tokenizer = tokenizer_files(recipe.data.tokenizer) if recipe.data.tokenizer else []
    return expand_chats(chat.train) + template + own_tokenizer


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Writes {train,heldout}.{bin,idx} and, with a weight for each of their tokens, {train,heldout}-weights.{bin,idx}.

    Found blocks of an interrupted start are kept; the bytes do not depend on chat.workers.
    Returns documents, tokens and sha256 of each part, what packing makes of them at chat.sequence_length, and that length.
    Raises DataError with file and line for what is no conversation and for a template that cannot be used.
    """
    # megatron's import takes seconds that outside_files can do without
    from minitron_megatron.data.answers import pack_answers
    from minitron_megatron.data.index import split_and_merge

    chat = chat_section(recipe)
    tokenizer = model_tokenizer(recipe, inputs["import"])
    _require_space(chat, tokenizer, folder)
    blocks = _encode(chat, tokenizer, folder / "blocks" / "conversations")
    parts = split_and_merge(
        blocks, folder, heldout_documents=chat.heldout_conversations, setting="chat.heldout_conversations", what="conversation(s)"
    )
    packed = {
        "train": pack_answers(folder / "train", sequence_length=chat.sequence_length, packing=chat.packing),
        "heldout": pack_answers(folder / "heldout", sequence_length=chat.sequence_length, packing="sequential"),
    }
    shutil.rmtree(folder / "blocks")
    trained = packed["train"]
    return {
        "summary": f"{trained.texts:,} conversations, {parts['train'].tokens:,} tokens, {trained.answer_tokens:,} of them answers, in "
        f"{len(trained.packing):,} samples of {chat.sequence_length}; {trained.cut} cut, {trained.without_answer} without an answer left out",
        "parts": {name: {**asdict(part), **packed[name].figures()} for name, part in parts.items()},
        "sequence_length": chat.sequence_length,
        "packing": chat.packing,
        "eod": tokenizer.eod,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.digest,
    }


def chat_section(recipe: Recipe) -> Chat:
    """The recipe's section, without which the chain does not come here."""
    if recipe.chat is None:
        raise RuntimeError("stage chat without a section chat")
    return recipe.chat


def _encode(chat: Chat, tokenizer: Tokenizer, folder: Path) -> Any:
    from minitron_megatron.data.index import encode_files, token_dtype

    template = load_template(chat.template, tokenizer.path, chat.template_arguments)
    _refuse_marks_as_letters(tokenizer, template)
    encoder = ChatEncoder(tokenizer, template, token_dtype(tokenizer.vocab_size))
    return encode_files(expand_chats(chat.train), lambda file: conversations(file, chat.messages_field), encoder, folder, workers=chat.workers)


def _refuse_marks_as_letters(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """The model would learn to spell the end of an answer, and never to end one."""
    marks = [token for token in tokenizer.control if template.writes(token)]
    if marks:
        raise DataError(
            f"the chat template {template.source} writes {', '.join(marks)}, which SentencePiece ({tokenizer.path}) takes for letters; name a folder "
            "with the same vocabulary as tokenizer.json in data.tokenizer (`minitron export` writes one), or a template without them in chat.template"
        )


def _require_space(chat: Chat, tokenizer: Tokenizer, folder: Path) -> None:
    """Blocks and merged files: 2 copies of an id and a weight for each 4 bytes of text, less what an interrupted start wrote."""
    id_bytes = 2 if tokenizer.vocab_size < 65500 else 4
    text_bytes = sum(path.stat().st_size for path in expand_chats(chat.train))
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    require_disk_space(folder, text_bytes * 2 * (id_bytes + 4) // 4 - written, "tokenized conversations")
