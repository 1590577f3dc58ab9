"""The demo's distillation against plain cross-entropy on the same tokens.

Claim: KL to the teacher is at least 20 % lower after distillation.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import minitron, result_of, write_result

STAGES = ("import", "data", "importance", "prune", "distill", "evaluate")
LOSSES = ("forward_kl", "cross_entropy")
STEPS, SAMPLES = 150, 2
TRAINING = [
    f"distill.steps={STEPS}",
    f"distill.global_batch={SAMPLES}",
    "distill.learning_rate={peak: 3e-4, minimum: 3e-5, warmup_steps: 15}",
]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, dict[str, Any]] = {}
        for loss in LOSSES:
            for stage in STAGES:
                minitron(stage, f"runs={folder}", *TRAINING, f"distill.loss={loss}", "evaluate.tasks=[]", "evaluate.generate_tokens=0")
            models = result_of(Path(folder), "evaluate")["models"]
            found["pruned"], found[loss] = models["pruned"]["domains"], models["distilled"]["domains"]
        report(found)


def report(found: dict[str, dict[str, Any]]) -> None:
    def row(name: str) -> str:
        cells = [
            f"{found[name][domain][figure]['value']:.3f} ± {found[name][domain][figure]['stderr']:.3f}"
            for figure in ("kl", "perplexity")
            for domain in ("in_domain", "out_of_domain")
        ]
        return f"| {name} | {' | '.join(cells)} |"

    ratios = {
        f"{figure}_{domain}": found["forward_kl"][domain][figure]["value"] / found["cross_entropy"][domain][figure]["value"]
        for figure in ("kl", "perplexity")
        for domain in ("in_domain", "out_of_domain")
    }
    text = "\n".join(
        [
            f"SmolLM2-135M → 97M, {STEPS} steps × {SAMPLES * 128} tokens, the same tokens in the same order; ± is one standard error over windows.",
            "",
            "| trained with | KL in domain | KL out of domain | perplexity in domain | perplexity out of domain |",
            "|---|--:|--:|--:|--:|",
            *(row(name) for name in found),
            "",
            f"Forward KL ÷ cross-entropy: KL to the teacher **{ratios['kl_in_domain']:.2f}** in domain, "
            f"**{ratios['kl_out_of_domain']:.2f}** out of domain; "
            f"perplexity {ratios['perplexity_in_domain']:.2f} and {ratios['perplexity_out_of_domain']:.2f}.",
        ]
    )
    write_result("kd_vs_cross_entropy", "Distillation against cross-entropy on equal tokens", text, ratios)


if __name__ == "__main__":
    main()
