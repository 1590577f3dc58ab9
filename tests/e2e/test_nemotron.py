"""`minitron run` on a Nemotron with a SentencePiece tokenizer; its student for transformers, and in a .nemo archive that is a source again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture

from .test_chain import our_logits, start
from .tiny_model import write_recipe, write_text

pytestmark = pytest.mark.slow
SMALL = ("distill.steps=8", "importance.samples=8", "parallel={tensor: 2, sequence: true}", "evaluate.generate_tokens=2")


def write_nemotron(folder: Path, text: Path) -> None:
    """Heads of 8 channels of which 4 turn; tokenizer.model is all there is of a tokenizer."""
    import sentencepiece
    from transformers import NemotronConfig, NemotronForCausalLM

    folder.mkdir()
    files = sorted(text.glob("*.txt"))
    sentencepiece.SentencePieceTrainer.train(
        input=[str(file) for file in files],
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=pieces.get_piece_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=pieces.bos_id(),
        eos_token_id=pieces.eos_id(),
    )
    NemotronForCausalLM(config).save_pretrained(folder)


def result_of(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "result.json").read_text())


def test_a_nemotron_goes_through_the_chain_and_through_an_archive(tmp_path: Path) -> None:
    import sentencepiece
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_text(tmp_path / "text")
    write_nemotron(tmp_path / "model", tmp_path / "text")
    recipe, run = write_recipe(tmp_path), tmp_path / "runs" / "tiny"
    start(recipe, *SMALL)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model" / "tokenizer.model"))
    assert result_of(run, "data")["eod"] == pieces.eos_id()
    model, report = AutoModelForCausalLM.from_pretrained(run / "export" / "model", dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.model_type, model.config.hidden_size, model.config.head_dim, model.config.num_hidden_layers) == ("nemotron", 24, 8, 3)
    tokenizer, text = AutoTokenizer.from_pretrained(run / "export" / "model"), (tmp_path / "text" / "00.txt").read_text()
    tokens = torch.tensor(tokenizer(text)["input_ids"][:60])
    assert tokens.tolist() == pieces.encode(text)[:60]
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    arch = Architecture.from_dict(result_of(run, "distill")["architecture"])
    torch.testing.assert_close(theirs, our_logits(run / "distill" / "checkpoint", arch, tokens), rtol=0, atol=1e-4)  # fp32, two implementations

    start(recipe, *SMALL, "export.format=nemo", verb="export")
    archive = run / "export" / "model.nemo"
    start(recipe, *SMALL, f"model.path={archive}", "name=again", "prune.target={layers: 2}", verb="import")
    again = result_of(tmp_path / "runs" / "again", "import")
    assert (again["architecture"], again["weights_sha256"]) == (arch.to_dict(), result_of(run, "distill")["weights_sha256"])
    assert not (tmp_path / "runs" / "again" / "import" / "unpacked").exists()
    tokenizers = [(folder / "tokenizer.model").read_bytes() for folder in (tmp_path / "model", tmp_path / "runs" / "again" / "import" / "tokenizer")]
    assert tokenizers[0] == tokenizers[1]
