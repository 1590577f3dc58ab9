"""Tokens a second of teacher, width and depth student, forward and in generation, at batches from 1 to 64, in bf16 and in FP8.

The papers' figures for the 4B students against Llama-3.1-8B (arXiv 2408.11796, with TensorRT-LLM): depth 2.7 ×, width 1.8 ×, FP8 1.4 ×. Here
the models run as the stages of this project run them, not as a server would: each step of generation launches every kernel anew, so that small
batches measure the launches. A forward pass has an output layer and makes the logits of its last token, as generation does.

    bash benchmarks/gpu/run.sh throughput                  # about 6 minutes
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

from clock import failed, measured, release
from options import command_line, one_process
from shapes import BF16, precision, shapes
from writer import table, write

FP8 = "tensorwise"
FORWARD, GENERATION = "forward", "generation"
TOKENS_AT_ONCE = 131072
"""Of a forward pass at the most: larger batches go through in micro-batches."""
ROWS_OF_FP8 = 16
"""FP8 products want a multiple of it; a step of generation has one row a text."""


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--batches", nargs="+", type=int, default=None)
    parser.add_argument("--models", nargs="+", choices=["teacher", "width", "depth"], default=["teacher", "width", "depth"])
    parser.add_argument("--precisions", nargs="+", choices=[BF16, FP8], default=[BF16, FP8])
    parser.add_argument("--prompt", type=int, default=None, help="tokens of a prompt, and of a sequence of the forward pass")
    parser.add_argument("--new", type=int, default=None, help="tokens generated")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    asked.batches = asked.batches or ([1, 4] if asked.tiny else [1, 4, 16, 64])
    asked.prompt, asked.new = asked.prompt or (16 if asked.tiny else 1024), asked.new or (4 if asked.tiny else 64)
    figures: list[dict[str, Any]] = []
    with one_process(asked.device) as (world, layout):
        for name, model in product(asked.precisions, asked.models):
            figures += of_model(name, model, world, layout, asked)
            report(figures, asked, finished=False)  # a command that is ended loses none
    report(figures, asked)


def report(figures: list[dict[str, Any]], asked: argparse.Namespace, *, finished: bool = True) -> None:
    write("throughput", "Forward and generation on one GPU", body(figures, asked), figures, asked, finished=finished)


def body(figures: list[dict[str, Any]], asked: argparse.Namespace) -> list[str]:
    found = {(x["what"], x["model"], x["precision"], x["batch"]): x for x in figures}
    rows = []
    for (what, model, name, batch), x in found.items():
        teacher, bf16 = found.get((what, "teacher", name, batch)), found.get((what, model, BF16, batch))
        cells = [f"{x['tokens_per_second']:,.0f}" if "seconds" in x else x["error"], over(x, teacher), over(x, bf16) if name != BF16 else "–"]
        rows.append([what, model, name, str(batch), *cells])
    head = (
        f"Llama-3.1-8B and its 4B students by width and by depth, random weights; forward: sequences of {asked.prompt:,} tokens; generation: "
        f"{asked.new} tokens behind prompts of {asked.prompt:,}, greedy, keys and values kept; tokens/s counts the prompt's in the first and the "
        "generated ones in the second (with the time of the prompt)."
    )
    return [head, "", *table(("", "model", "precision", "batch", "tokens/s", "over teacher", "over bf16"), rows)]


def over(case: dict[str, Any], other: dict[str, Any] | None) -> str:
    if not other or "seconds" not in case or "seconds" not in other:
        return "–"
    return f"{case['tokens_per_second'] / other['tokens_per_second']:.2f}"


def of_model(name: str, model_name: str, world: Any, layout: Any, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """All batches of one model in one precision; FP8 with weights in FP8, as a frozen model has them. Where it cannot be built, why."""
    from models import frozen_model

    known = {"model": model_name, "precision": name}
    arch, chosen = getattr(shapes(tiny=asked.tiny), model_name), precision(name, emulated=asked.device == "cpu")
    try:
        model = frozen_model(arch, world, layout, chosen.teacher, variable_lengths=True)
    except Exception as error:
        cases = [{"what": what, **known, "batch": batch, **failed(error)} for batch in asked.batches for what in (FORWARD, GENERATION)]
    else:
        batches = sorted(asked.batches, reverse=True)
        cases = [{**known, **case} for batch in batches for case in of_batch(model, batch, world, asked, fp8=chosen.teacher is not None)]
        del model
    release(world.platform)
    return cases


def of_batch(model: Any, batch: int, world: Any, asked: argparse.Namespace, *, fp8: bool) -> list[dict[str, Any]]:
    cases = []
    ahead = partial(pad, model) if fp8 and batch % ROWS_OF_FP8 and asked.device == "cuda" else lambda: None
    for what, tokens, step in works(model, batch, world, asked):
        found = attempted(ahead, step, world.platform, asked)
        speed = {"tokens_per_second": tokens / found["seconds"]} if "seconds" in found else {}
        cases.append({"what": what, "batch": batch, **found, **speed})
        print(cases[-1], flush=True)
    return cases


def pad(model: Any) -> None:
    """megatron's padding of each FP8 product, from now on; where batches are multiples already it would make sixteen tokens of each."""
    from megatron.core.fp8_utils import prepare_model_for_fp8_inference

    for chunk in model.chunks:
        prepare_model_for_fp8_inference(chunk)


def works(model: Any, batch: int, world: Any, asked: argparse.Namespace) -> list[tuple[str, int, Callable[[], Any]]]:
    """(what, tokens that count, work)."""
    import torch

    dice = torch.Generator().manual_seed(5)
    prompts_BP = torch.randint(model.architecture.vocab, (batch, asked.prompt), generator=dice)
    return [
        (FORWARD, batch * asked.prompt, partial(forward, model, forward_batches(prompts_BP, world))),
        (GENERATION, batch * asked.new, partial(generation, model, prompts_BP, asked.new)),
    ]


def forward_batches(prompts_BP: Any, world: Any) -> list[Any]:
    """On the device, ahead of the clock."""
    from minitron_megatron.data.batches import collate

    together = max(1, min(len(prompts_BP), TOKENS_AT_ONCE // prompts_BP.shape[1]))
    rows = list(range(len(prompts_BP)))
    samples_Bs = prompts_BP.new_zeros(len(prompts_BP), prompts_BP.shape[1] + 1)  # with a label behind the last token
    samples_Bs[:, :-1] = prompts_BP
    parts = [rows[start : start + together] for start in range(0, len(rows), together)]
    return [collate(samples_Bs, part).to(world.platform.device) for part in parts]


def forward(model: Any, batches: list[Any]) -> None:
    from minitron_megatron.model.run import forward_only

    def last_logits(hidden_SBD: Any, _: Any) -> None:
        model.last.output_layer(hidden_SBD[-1:], weight=model.output_weight())

    forward_only(model, batches, consume=last_logits)


def generation(model: Any, prompts_BP: Any, new: int) -> None:
    """eod −1: no text ends early."""
    from minitron_megatron.model.generate import generate

    generate(model, prompts_BP, new_tokens=new, eod=-1, micro_batch=len(prompts_BP))


def attempted(ahead: Callable[[], Any], step: Callable[[], Any], platform: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """Where it does not fit or fails, why."""
    try:
        ahead()
        return measured(step, platform, runs=1 if asked.tiny else asked.runs, warm_up=1).to_dict()
    except Exception as error:
        return failed(error)


if __name__ == "__main__":
    main()
