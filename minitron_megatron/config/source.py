"""Sections `model` and `data`: what is compressed, and on what text."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from minitron_megatron.config.section import UNSHAPING, Section


class Hub(Section):
    """A model of the Hugging Face hub, at a commit: a branch's name would be another model tomorrow."""

    repository: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="OWNER/NAME")
    revision: str = Field(pattern=r"^[0-9a-f]{40}$", description="the commit's full hash")


class Model(Section):
    """The model to compress."""

    path: str = Field(description="folder with config.json, safetensors and tokenizer, a .nemo archive, or a Megatron torch_dist checkpoint")
    hub: Annotated[Hub | None, UNSHAPING] = Field(
        None, description="where stage import fetches it from, once, if `path` does not exist; hf_config stands in until then"
    )
    hf_config: str | None = Field(
        None,
        description="config.json that goes with a Megatron checkpoint, stands in for a model not yet on this disk, "
        "or replaces what a .nemo archive says; its folder has the tokenizer",
    )
    tokenizer: str | None = Field(
        None, description="folder with the tokenizer's files, or a SentencePiece .model, where they do not lie beside config.json"
    )


class Data(Section):
    """Text for training, calibration and evaluation: globs of .txt, .jsonl(.gz, .zst) or .parquet."""

    train: list[str] = Field(min_length=1, description="globs; one .txt file, one .jsonl line or one .parquet row is a document")
    text_field: str = Field("text", description="field or column that holds the text in .jsonl and .parquet")
    heldout_documents: int = Field(12, ge=1, description="the last documents of `train`, kept for evaluation; training never sees them")
    out_of_domain: list[str] = Field([], description="globs of another corpus, evaluated only")
    tokenizer: str | None = Field(None, description="folder of a Hugging Face tokenizer or a SentencePiece .model; default: the model's own")
    workers: int = Field(2, ge=1, description="processes that tokenize")
