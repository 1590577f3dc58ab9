"""One small face over three kinds of tokenizer: Hugging Face fast, SentencePiece, and whatever transformers can open.

It imports neither torch nor megatron, so that worker processes start in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from minitron_megatron.errors import DataError

# where the id of the end-of-document token is looked up, first hit first
_TOKEN_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
_ID_SETTINGS = ("config.json", "generation_config.json")
_VOCABULARY = ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tekken.json", "added_tokens.json")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer that is rebuilt from its path when it is pickled.

    vocab_size: highest id + 1. eod: id that ends each document (the tokenizer's eos).
    digest: sha256 of its vocabulary files. exact_vocabulary: SentencePiece, whose size must be the model's own
    (a Hugging Face vocabulary may be padded up to it). control: what SentencePiece gives ids of its own, but takes for letters in a text.
    """

    path: Path
    vocab_size: int
    eod: int
    digest: str
    exact_vocabulary: bool
    _encode_batch: Callable[[list[str]], list[list[int]]] = field(repr=False, compare=False)
    _decode: Callable[[list[int]], str] = field(repr=False, compare=False)
    control: tuple[str, ...] = ()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; no beginning- or end-of-sequence token is added."""
        return self._encode_batch(list(texts))

    def encode(self, text: str) -> list[int]:
        return self._encode_batch([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens and rows that pad the embeddings are left out."""
        return self._decode([int(token) for token in ids])

    def __reduce__(self) -> tuple[Callable[[Path], Tokenizer], tuple[Path]]:
        return _kept, (self.path,)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a folder with a Hugging Face tokenizer, or a SentencePiece .model file or folder with tokenizer.model.

    Raises DataError where there is none, it cannot be read, or it has no end-of-sequence token.
    """
    source = Path(path)
    vocabulary = _vocabulary_files(source)
    try:
        if vocabulary[0].name == "tokenizer.json":
            return _hugging_face(source, vocabulary)
        if vocabulary[0].suffix == ".model":
            return _sentencepiece(source, vocabulary)
        return _transformers(source, vocabulary)
    except DataError:
        raise
    except Exception as error:  # the Rust parser raises bare Exception, the C++ one RuntimeError
        raise DataError(f"{vocabulary[0]}: cannot be read as a tokenizer: {' '.join(str(error).split())[:200]}") from None


@lru_cache(maxsize=1)
def _kept(path: Path) -> Tokenizer:
    """A worker process is sent the same tokenizer with every block of texts, and opens it once."""
    return load_tokenizer(path)


def special_tokens(path: Path) -> dict[str, str]:
    """Texts of the special tokens by name (bos_token, eos_token, …), as a folder's settings have them."""
    folder = path if path.is_dir() else path.parent
    found: dict[str, str] = {}
    for name in reversed(_TOKEN_SETTINGS):
        settings = {key: value for key, value in _settings(folder / name).items() if key.endswith("_token")}
        found |= {key: value["content"] if isinstance(value, dict) else value for key, value in settings.items() if isinstance(value, dict | str)}
    return found


def tokenizer_files(path: str | Path) -> list[Path]:
    """Every file that shapes the tokenizer: its vocabulary and the settings that name its end-of-sequence token."""
    source = Path(path)
    settings = [source / name for name in (*_TOKEN_SETTINGS, *_ID_SETTINGS)] if source.is_dir() else []
    return _vocabulary_files(source) + [file for file in settings if file.is_file()]


def _vocabulary_files(source: Path) -> list[Path]:
    if source.is_file() and source.suffix == ".model":
        return [source]
    for name in ("tokenizer.json", "tokenizer.model"):
        if (source / name).is_file():
            return [source / name]
    found = [source / name for name in _VOCABULARY if (source / name).is_file()]
    if not found:
        raise DataError(f"{source}: no tokenizer here; name a folder with tokenizer.json or tokenizer.model, or a SentencePiece .model file")
    return found


def _hugging_face(source: Path, vocabulary: list[Path]) -> Tokenizer:
    import tokenizers

    fast = tokenizers.Tokenizer.from_file(str(vocabulary[0]))
    fast.no_truncation()  # tokenizer.json may carry truncation and padding of its last use: documents would be cut
    fast.no_padding()
    return Tokenizer(
        path=source,
        vocab_size=max(fast.get_vocab(with_added_tokens=True).values()) + 1,
        eod=_eod(source, fast.token_to_id),
        digest=_digest(vocabulary),
        exact_vocabulary=False,
        _encode_batch=lambda texts: [found.ids for found in fast.encode_batch_fast(texts, add_special_tokens=False)],
        _decode=lambda ids: fast.decode(ids, skip_special_tokens=True),
    )


def _sentencepiece(source: Path, vocabulary: list[Path]) -> Tokenizer:
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary[0]))
    own_eod, known = pieces.eos_id(), pieces.get_piece_size()
    return Tokenizer(
        path=source,
        vocab_size=known,
        eod=own_eod if own_eod >= 0 else _eod(source, pieces.piece_to_id),
        digest=_digest(vocabulary),
        exact_vocabulary=True,
        _encode_batch=lambda texts: pieces.encode(texts, out_type=int, num_threads=1),
        # a model with padded embeddings may give ids that are no piece
        _decode=lambda ids: pieces.decode([token for token in ids if token < known]),
        control=tuple(pieces.id_to_piece(number) for number in range(known) if pieces.is_control(number)),
    )


def _transformers(source: Path, vocabulary: list[Path]) -> Tokenizer:
    from transformers import AutoTokenizer

    slow: Any = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    ids = slow.get_vocab()
    return Tokenizer(
        path=source,
        vocab_size=max(ids.values()) + 1,
        eod=slow.eos_token_id if slow.eos_token_id is not None else _eod(source, ids.get),
        digest=_digest(vocabulary),
        exact_vocabulary=False,
        _encode_batch=lambda texts: slow(texts, add_special_tokens=False)["input_ids"],
        _decode=lambda ids: slow.decode(ids, skip_special_tokens=True),
    )


def _eod(source: Path, id_of: Callable[[str], int | None]) -> int:
    """Id of eos, from the tokenizer's settings by name, else from the model's settings by number."""
    for name in _TOKEN_SETTINGS:
        token = _settings(source / name).get("eos_token")
        found = id_of(token["content"] if isinstance(token, dict) else token) if token else None
        if found is not None:
            return found
    for name in _ID_SETTINGS:
        number = _settings(source / name).get("eos_token_id")
        if number is not None:
            return int(number[0] if isinstance(number, list) else number)
    raise DataError(f'{source}: the tokenizer has no end-of-sequence token; name one as "eos_token" in its tokenizer_config.json')


def _settings(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}


def _digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()
