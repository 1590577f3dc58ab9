"""What a user brings: a Hugging Face model with its tokenizer, text, and a recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

SENTENCE = "the old harbour lies behind a wall of stone and every boat that leaves it carries salt bread and one lamp"
SEQUENCE, STEPS = 32, 60


def write_text(folder: Path, files: int = 24) -> None:
    """Sentences of few words in random order, one document a file."""
    folder.mkdir()
    dice = random.Random(7)
    for number in range(files):
        sentences = [" ".join(dice.choices(SENTENCE.split(), k=9)).capitalize() + "." for _ in range(8)]
        (folder / f"{number:02d}.txt").write_text(" ".join(sentences))


def write_model(folder: Path, text: Path, *, experts: int = 0, **sizes: Any) -> None:
    """A Llama of 4 layers with 8 heads in 2 groups and head channels that are not hidden / heads, untied; with experts a Mixtral.

    sizes: other ones, by their names in config.json.
    """
    folder.mkdir()
    vocabulary = _write_tokenizer(folder, text)
    torch.manual_seed(0)
    family, model = (MixtralConfig, MixtralForCausalLM) if experts else (LlamaConfig, LlamaForCausalLM)
    usual = {
        "vocab_size": vocabulary + 3,  # a padded vocabulary, as many models have
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **({"num_local_experts": experts, "num_experts_per_tok": 2} if experts else {}),
    }
    config = family(**{**usual, **sizes})
    model(config).save_pretrained(folder)


def _write_tokenizer(folder: Path, text: Path) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eod>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train([str(file) for file in sorted(text.glob("*.txt"))], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eod>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def write_recipe(folder: Path) -> Path:
    recipe: dict[str, Any] = {
        "name": "tiny",
        "runs": str(folder / "runs"),
        "platform": "cpu",
        "precision": "fp32",
        "model": {"path": str(folder / "model")},
        "data": {"train": [str(folder / "text" / "*.txt")], "heldout_documents": 4, "workers": 1},
        "parallel": {"pipeline": 2},
        "importance": {"samples": 8, "sequence_length": SEQUENCE},
        "prune": {"target": {"layers": 3, "hidden": 24, "ffn": 32, "heads": 4}},
        "distill": {
            "steps": STEPS,
            "sequence_length": SEQUENCE,
            "global_batch": 4,
            "micro_batch": 2,
            "learning_rate": {"peak": 1e-3, "minimum": 1e-4, "warmup_steps": 3},
            "save_every_steps": 5,
            "validate_every_steps": 20,
            "validation_samples": 4,
        },
        "evaluate": {"tokens": 4 * SEQUENCE, "sequence_length": SEQUENCE, "prompt": "The old", "generate_tokens": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
