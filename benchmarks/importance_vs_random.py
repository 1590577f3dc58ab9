"""Held-out perplexity right after pruning only FFN 1536 → 1024: activation importance, random scores, weight magnitude.

Claim: importance is at least 5 × lower than random. All models read the same windows in one pass of this process.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from minitron_megatron.platform import activate

platform = activate("cpu")  # before anything imports megatron

from common import RECIPE, minitron, result_of, write_result  # noqa: E402

from minitron_megatron.arch.architecture import Architecture  # noqa: E402
from minitron_megatron.checkpoint.sharded import load_model  # noqa: E402
from minitron_megatron.config.family import load_recipe  # noqa: E402
from minitron_megatron.data.samples import evaluation_windows  # noqa: E402
from minitron_megatron.evaluate.compare import compare, domain_figures  # noqa: E402
from minitron_megatron.model.build import build_model  # noqa: E402
from minitron_megatron.model.precision import torch_dtype  # noqa: E402
from minitron_megatron.parallel.layout import global_layout  # noqa: E402
from minitron_megatron.parallel.world import distributed_world  # noqa: E402

WIDTH_ONLY = ["prune.target.ffn=1024", "prune.target.layers=null", "data.out_of_domain=[]"]
ACTIVATION = "activation (batch L2, sequence mean)"
CANDIDATES = {
    ACTIVATION: ["prune.scores=activation"],
    **{f"random, seed {seed}": ["prune.scores=random", f"prune.seed={seed}"] for seed in range(3)},
    "weight magnitude": ["prune.scores=magnitude"],
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs, checkpoints = Path(folder), {}
        for number, (name, scores) in enumerate(CANDIDATES.items()):
            for stage in ("import", "data", "importance", "prune"):
                minitron(stage, f"runs={folder}", *WIDTH_ONLY, *scores)
            run = runs / "smollm2_135m_to_97m"
            checkpoints[name] = (run / "prune" / "checkpoint").rename(runs / f"checkpoint-{number}")
        source, target = (Architecture.from_dict(result_of(runs, stage)["architecture"]) for stage in ("import", "prune"))
        report(perplexities({"teacher": run / "import" / "checkpoint", **checkpoints}, source, target, run / "data" / "heldout"))


def perplexities(checkpoints: dict[str, Path], source: Architecture, target: Architecture, heldout: Path) -> dict[str, Any]:
    recipe = load_recipe(RECIPE, ["parallel.pipeline=1"])
    with distributed_world(platform) as world:
        layout, models = global_layout(recipe.parallel, world), {}
        for name, checkpoint in checkpoints.items():
            arch = source if name == "teacher" else target
            models[name] = build_model(arch, layout, platform, torch_dtype("bf16" if platform.supports_bf16_matmul() else "fp32"))
            load_model(models[name], checkpoint)
        length = recipe.evaluate.sequence_length
        windows = evaluation_windows(heldout, sequence_length=length, tokens=recipe.evaluate.tokens)
        return domain_figures(compare(models, windows, world, what="heldout"), length)


def report(figures: dict[str, Any]) -> None:
    found = {name: values["perplexity"]["value"] for name, values in figures.items()}
    rows = [f"| {name} | {values['perplexity']['value']:,.1f} ± {values['perplexity']['stderr']:,.1f} |" for name, values in figures.items()]
    random = [value for name, value in found.items() if name.startswith("random")]
    ratio = min(random) / found[ACTIVATION]
    text = "\n".join(
        [
            "SmolLM2-135M, calibration 64 × 512 tokens, no training after the cut, 24,576 held-out tokens.",
            "",
            "| scores | held-out perplexity |",
            "|---|--:|",
            *rows,
            "",
            f"Random (the luckiest of three seeds) ÷ importance: **{ratio:.1f} ×**; median of the seeds ÷ importance: "
            f"{statistics.median(random) / found[ACTIVATION]:.1f} ×.",
        ]
    )
    figures_line = {"luckiest_random_over_importance": ratio, "perplexity": found}
    write_result("importance_vs_random", "Perplexity right after pruning, by scores", text, figures_line)


if __name__ == "__main__":
    main()
