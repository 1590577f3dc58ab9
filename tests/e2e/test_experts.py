"""`minitron run` on a Mixtral with its experts on two processes, from the Hugging Face folder to a student with fewer experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minitron_megatron.arch.architecture import Architecture

from .test_chain import our_logits, start
from .tiny_model import write_model, write_recipe, write_text

pytestmark = pytest.mark.slow


def test_a_mixtral_loses_experts_and_neurons_and_runs_in_plain_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_text(tmp_path / "text")
    write_model(tmp_path / "model", tmp_path / "text", experts=6)
    output = start(
        write_recipe(tmp_path),
        "parallel={data: 2, expert: 2}",
        "prune.target={layers: 3, hidden: 24, ffn: 32, heads: 4, experts: 4}",
        "distill.steps=12",
        "importance.samples=20",
    )
    assert "experts 6 → 4" in output
    run = tmp_path / "runs" / "tiny"
    model, report = AutoModelForCausalLM.from_pretrained(run / "export" / "model", dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.num_local_experts, model.config.num_experts_per_tok, model.config.intermediate_size) == (4, 2, 32)
    tokens = torch.arange(3, 40)
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    arch = Architecture.from_dict(json.loads((run / "distill" / "result.json").read_text())["architecture"])
    torch.testing.assert_close(theirs, our_logits(run / "distill" / "checkpoint", arch, tokens), rtol=0, atol=1e-4)  # fp32, two implementations
    assert "experts" in (run / "report" / "report.html").read_text().lower()
