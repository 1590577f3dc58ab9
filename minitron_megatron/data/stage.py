"""The `data` stage: text files → train, heldout and out_of_domain indexed datasets in the model's vocabulary."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_megatron.artifact import Artifact, require_disk_space
from minitron_megatron.config.schema import Recipe
from minitron_megatron.data.corpus import expand
from minitron_megatron.data.tokenizer import Tokenizer, tokenizer_files
from minitron_megatron.data.vocabulary import model_tokenizer
from minitron_megatron.errors import DataError

if TYPE_CHECKING:
    from minitron_megatron.data.index import IndexSummary


def outside_files(recipe: Recipe) -> list[Path]:
    """Every file that this stage reads outside its input artifacts.

    Raises DataError for a glob or a tokenizer that is not there.
    """
    own_tokenizer = tokenizer_files(recipe.data.tokenizer) if recipe.data.tokenizer else []
    return expand(recipe.data.train) + expand(recipe.data.out_of_domain) + own_tokenizer


def run(recipe: Recipe, inputs: Mapping[str, Artifact], folder: Path) -> dict[str, Any]:
    """Writes {train,heldout,out_of_domain}.{bin,idx} into `folder`; found blocks of an interrupted start are kept.

    Returns documents, tokens and sha256 of each part, and eod, vocab_size and digest of the tokenizer.
    Raises DataError for a tokenizer of another model, and for text that is too short for what later stages ask of it.
    """
    tokenizer = model_tokenizer(recipe, inputs["import"])
    _require_space(recipe, tokenizer, folder)
    parts = _write_parts(recipe, tokenizer, folder)
    _check_lengths(recipe, {name: part.tokens for name, part in parts.items()})
    shutil.rmtree(folder / "blocks")
    tokens = ", ".join(f"{name} {part.tokens / 1e6:.2f}M" for name, part in parts.items())
    return {
        "summary": f"tokens: {tokens}",
        "parts": {name: asdict(part) for name, part in parts.items()},
        "eod": tokenizer.eod,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.digest,
    }


def _write_parts(recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> dict[str, IndexSummary]:
    # megatron's import takes seconds that outside_files can do without
    from minitron_megatron.data.index import merge, split_and_merge, tokenize

    data = recipe.data
    train_files, other_files = expand(data.train), expand(data.out_of_domain)
    encode = partial(tokenize, tokenizer=tokenizer, text_field=data.text_field, workers=data.workers)
    blocks = encode(train_files, folder=folder / "blocks" / "train")
    parts = split_and_merge(blocks, folder, heldout_documents=data.heldout_documents)
    if other_files:
        blocks = encode(other_files, folder=folder / "blocks" / "out_of_domain")
        parts["out_of_domain"] = merge(blocks, folder / "out_of_domain")
    return parts


def _check_lengths(recipe: Recipe, tokens: Mapping[str, int]) -> None:
    """What later stages would refuse, refused before any of them has run for hours."""
    for section, first, samples, length in _calibrations(recipe):
        needed = (first + samples) * length + 1
        if tokens["train"] < needed:
            behind = f" behind the first {first}" if first else ""
            raise DataError(
                f"data.train: {section}.samples={samples} of {length} tokens{behind} need {needed} tokens, there are {tokens['train']}; "
                f"at most {section}.samples={max((tokens['train'] - 1) // length - first, 0)}, or add text"
            )
    evaluated = {"evaluate": recipe.evaluate.sequence_length}
    _check_windows("heldout", tokens, _window_lengths(recipe) | evaluated, "raise data.heldout_documents")
    _check_windows("out_of_domain", tokens, evaluated, "add text")


def _check_windows(name: str, tokens: Mapping[str, int], lengths: Mapping[str, int], mend: str) -> None:
    """lengths: of the windows, by section."""
    window = max(lengths.values()) + 1
    if tokens.get(name, window) < window:
        long = " and ".join(f"{section}.sequence_length" for section, length in lengths.items() if length >= tokens[name])
        raise DataError(f"{name} text: {tokens[name]} tokens do not fill one evaluation window of {window}; {mend}, or shorten {long}")


def _calibrations(recipe: Recipe) -> list[tuple[str, int, int, int]]:
    """(section, samples ahead of its own, its samples, their length) of those who read no text twice."""
    importance, depth = recipe.importance, recipe.depth
    found = [("importance", importance.skip_samples, importance.samples, importance.sequence_length)]
    if depth and depth.criterion in ("perplexity", "logit_error"):
        found.append(("depth", 0, depth.samples, depth.sequence_length))
    return found


def _window_lengths(recipe: Recipe) -> dict[str, int]:
    """Of the sections that train and look at held-out text."""
    asking = {"distill": recipe.distill, "correct": recipe.correct}
    lengths = {section: part.sequence_length for section, part in asking.items() if part}
    short = recipe.search.short_distillation.sequence_length if recipe.search else None
    return {**lengths, "search.short_distillation": short} if short else lengths


def _require_space(recipe: Recipe, tokenizer: Tokenizer, folder: Path) -> None:
    """Blocks and merged files: 2 copies of an id for each 4 bytes of text, less what an interrupted start wrote."""
    id_bytes = 2 if tokenizer.vocab_size < 65500 else 4
    text_bytes = sum(path.stat().st_size for path in expand(recipe.data.train) + expand(recipe.data.out_of_domain))
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    require_disk_space(folder, text_bytes * 2 * id_bytes // 4 - written, "tokenized text")
