"""A SentencePiece tokenizer as transformers' tokenizer.json; with tokenizer.model alone transformers 5 gives other ids than SentencePiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minitron_megatron.data.tokenizer import Tokenizer, load_tokenizer
from minitron_megatron.errors import DataError

MODEL, FAST, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Types of pieces in sentencepiece_model.proto."""
TEXTS = (
    "The quick brown fox, 1789–2026: naïve café — Größe, 東京, Москва. def f(x): return x**2",
    " a space ahead, two  inside and one behind ",
    "two lines\n\tand a tab\n",
    "",
)
"""Letters of several scripts, digits, code and every kind of blank: what the two must agree on."""


def add_fast_tokenizer(folder: Path) -> bool:
    """Writes tokenizer.json beside a tokenizer.model that stands alone, and settings that name its special tokens.

    False where there is nothing to do, or where the two would not give the same ids: then nothing is written. User-defined symbols are cut
    out of a text first, as transformers always does, so that blanks beside one may be read otherwise.
    """
    if not (folder / MODEL).is_file() or (folder / FAST).is_file():
        return False
    try:
        pieces = load_tokenizer(folder)
    except DataError:  # of another kind under this name, such as tiktoken's: it travels as it is
        return False
    from sentencepiece import sentencepiece_model_pb2

    generated: Any = sentencepiece_model_pb2  # its classes are made while it is imported
    proto = generated.ModelProto()
    proto.ParseFromString((folder / MODEL).read_bytes())
    fast = _fast_tokenizer(proto)
    if fast is None or not _agree(fast, pieces, proto.trainer_spec.unk_id):
        return False
    known = json.loads((folder / SETTINGS).read_text()) if (folder / SETTINGS).is_file() else {}
    _add_ends(fast, proto, known)
    fast.save(str(folder / FAST))
    (folder / SETTINGS).write_text(json.dumps({**_settings(proto), **known, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
    return True


def _fast_tokenizer(proto: Any) -> Any:
    """tokenizers.Tokenizer of a SentencePiece model; None for one of words or letters."""
    import tokenizers
    from tokenizers import AddedToken, models

    trainer, unknown = proto.trainer_spec, proto.trainer_spec.unk_id
    model: Any
    if trainer.model_type == trainer.UNIGRAM:
        model = models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], unknown, trainer.byte_fallback)
    elif trainer.model_type == trainer.BPE:
        ids = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        unk = proto.pieces[unknown].piece
        model = models.BPE(vocab=ids, merges=_merges(proto, ids), unk_token=unk, fuse_unk=True, byte_fallback=trainer.byte_fallback)
    else:
        return None
    fast = tokenizers.Tokenizer(model)
    fast.normalizer, fast.decoder = _normalizer(proto.normalizer_spec), _decoder(proto.normalizer_spec)
    own = [piece for piece in proto.pieces if piece.type in (CONTROL, USER_DEFINED)]
    fast.add_special_tokens([AddedToken(piece.piece, normalized=False) for piece in own if piece.type == CONTROL])
    fast.add_tokens([AddedToken(piece.piece, normalized=False) for piece in own if piece.type == USER_DEFINED])
    return fast


def _merges(proto: Any, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the highest score first: SentencePiece's BPE merges the neighbours whose piece scores best."""
    found = []
    for piece in (piece for piece in proto.pieces if piece.type == NORMAL):
        splits = ((piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece)))
        pairs = [(left, right) for left, right in splits if left in ids and right in ids]
        found += [(-piece.score, ids[left], ids[right], (left, right)) for left, right in pairs]
    return [pair for *_, pair in sorted(found)]


def _normalizer(spec: Any) -> Any:
    """SentencePiece's own order: its map of characters, blanks, the blank ahead, ▁ for a blank."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _decoder(spec: Any) -> Any:
    from tokenizers import decoders

    strip = [decoders.Strip(content=" ", left=1)] if spec.add_dummy_prefix else []
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _agree(fast: Any, pieces: Tokenizer, unknown: int) -> bool:
    """The same ids, and the same text back; for what is unknown SentencePiece has a sign of its own."""
    encoded = [fast.encode(text, add_special_tokens=False).ids for text in TEXTS]
    return encoded == pieces.encode_batch(TEXTS) and all(unknown in ids or fast.decode(ids) == pieces.decode(ids) for ids in encoded)


def _add_ends(fast: Any, proto: Any, known: dict[str, Any]) -> None:
    """The tokens that the source's settings put around a text; in transformers they are the tokenizer's, elsewhere nobody asks for them."""
    from tokenizers import processors

    trainer = proto.trainer_spec
    ends = {place: number for place, number in (("bos", trainer.bos_id), ("eos", trainer.eos_id)) if known.get(f"add_{place}_token") and number >= 0}
    ahead, behind = ([proto.pieces[ends[place]].piece] if place in ends else [] for place in ("bos", "eos"))
    if ends:
        fast.post_processor = processors.TemplateProcessing(
            single=[*ahead, "$A", *behind],
            pair=[*ahead, "$A", *behind, *(f"{piece}:1" for piece in ahead), "$B:1", *(f"{piece}:1" for piece in behind)],
            special_tokens=[(proto.pieces[number].piece, number) for number in ends.values()],
        )


def _settings(proto: Any) -> dict[str, Any]:
    named = {name: getattr(proto.trainer_spec, f"{name}_id") for name in ("unk", "bos", "eos", "pad")}
    tokens = {f"{name}_token": proto.pieces[number].piece for name, number in named.items() if number >= 0}
    return {**tokens, "clean_up_tokenization_spaces": False}
