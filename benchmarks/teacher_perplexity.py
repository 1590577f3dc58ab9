"""Held-out perplexity of the imported teacher against plain `transformers` on the same windows.

Claim: they agree within 0.1 %. Needs a finished run of the demo (runs/smollm2_135m_to_97m up to evaluate).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from common import write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

RUN, TEXT, HELDOUT = Path("runs/smollm2_135m_to_97m"), Path(".demo/text/sotu"), 12


def main() -> None:
    result = json.loads((RUN / "evaluate" / "result.json").read_text())
    length, ours = result["sequence_length"], result["models"]["teacher"]["domains"]["in_domain"]["perplexity"]["value"]
    reference = transformers_perplexity(length, result["tokens"]["in_domain"] // length)
    difference = abs(ours / reference - 1)
    text = (
        f"Teacher (SmolLM2-135M), {result['tokens']['in_domain']:,} tokens of the last {HELDOUT} speeches in windows of {length}.\n\n"
        f"| | perplexity |\n|---|--:|\n| here, {result['precision']}, PP=2 | {ours:.4f} |\n| transformers, fp32 | {reference:.4f} |\n\n"
        f"Relative difference: **{difference:.2%}**."
    )
    write_result("teacher_perplexity", "Teacher's perplexity against transformers", text, {"relative_difference": difference})


def transformers_perplexity(length: int, windows: int) -> float:
    """An independent path: text files → transformers' tokenizer → transformers' model, fp32."""
    tokenizer = AutoTokenizer.from_pretrained(".demo/model")
    speeches = [path.read_text() for path in sorted(TEXT.glob("*.txt"))[-HELDOUT:]]
    stream = [token for speech in speeches for token in [*tokenizer.encode(speech, add_special_tokens=False), tokenizer.eos_token_id]]
    model = AutoModelForCausalLM.from_pretrained(".demo/model", dtype=torch.float32)
    total = 0.0
    for window in range(windows):
        tokens = torch.tensor([stream[window * length : (window + 1) * length + 1]])
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
    return math.exp(total / (windows * length))


if __name__ == "__main__":
    main()
