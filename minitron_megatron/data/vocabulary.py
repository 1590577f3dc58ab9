"""The tokenizer that a recipe means, held against the model whose ids it is to give."""

from __future__ import annotations

from pathlib import Path

from minitron_megatron.artifact import Artifact
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.tokenizer import Tokenizer, load_tokenizer
from minitron_megatron.errors import DataError

SAMPLE_TEXT = "The quick brown fox, 1789–2026: naïve café — Größe, 東京, Москва. def f(x): return x**2\n"
"""Letters, digits, punctuation, several scripts and code: two tokenizers that agree on it are the same for our purpose."""


def model_tokenizer(recipe: Recipe, source: Artifact) -> Tokenizer:
    """The recipe's tokenizer, else the imported model's own. Raises DataError for one of another model."""
    tokenizer = load_tokenizer(recipe.data.tokenizer or source.path / "tokenizer")
    check_vocabulary(tokenizer, int(source.result["architecture"]["vocab"]), foreign=recipe.data.tokenizer is not None)
    if recipe.data.tokenizer:
        refuse_other_tokenizer(tokenizer, source.path / "tokenizer")
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, model_vocab: int, *, foreign: bool) -> None:
    """Raises DataError where the tokenizer can give ids without an embedding, or is plainly another model's.

    foreign: named by the recipe. Its own SentencePiece may be smaller than the padded embeddings, another may not.
    """
    size = tokenizer.vocab_size
    differs = foreign and tokenizer.exact_vocabulary and size != model_vocab
    if size > model_vocab or tokenizer.eod >= model_vocab or differs:
        raise DataError(
            f"{tokenizer.path}: the tokenizer's vocabulary of {size} is not the model's of {model_vocab}; "
            "set data.tokenizer to the one the model was trained with, or leave it out to use the model's own"
        )


def refuse_other_tokenizer(tokenizer: Tokenizer, own: Path) -> None:
    """Raises DataError where the recipe's tokenizer gives other ids than the model's own, which is the one it was trained with."""
    try:
        expected = load_tokenizer(own)
    except DataError:  # the source came without one: the recipe's has to be believed
        return
    if tokenizer.encode(SAMPLE_TEXT) != expected.encode(SAMPLE_TEXT):
        raise DataError(
            f"{tokenizer.path}: this tokenizer gives other ids than the model's own; leave data.tokenizer out, "
            "or import the model that was trained with it"
        )
