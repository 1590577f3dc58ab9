"""The importance pass beside a plain forward pass of the same batches, at Llama-3.1-8B's shape in bf16: time (goal ≤ 1.10 ×) and memory.

Every axis at once, by the default aggregation and by the sums of all criteria and aggregations, on a model without its output layer as the stage
has it; beside them a pass that makes logits, as a stock GPTModel ends.

    bash benchmarks/gpu/run.sh importance                  # about 2 minutes
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from clock import measured, release
from options import command_line, one_process
from shapes import shapes
from writer import table, write

DEFAULT, ALL, FORWARD, LOGITS = "importance, importance.sums=default", "importance, importance.sums=all", "plain forward pass", "with logits"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=None)
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    asked.sequence = asked.sequence or (64 if asked.tiny else 8192)
    with one_process(asked.device) as (world, layout):
        figures = measure_all(world, layout, asked)
    write("importance", "The importance pass on one GPU", body(figures, asked), figures, asked)


def body(figures: dict[str, dict[str, Any]], asked: Any) -> list[str]:
    plain = figures[FORWARD]
    rows = [
        [
            side,
            f"{x['seconds']:.3f} s",
            f"{x['seconds'] / plain['seconds']:.3f}",
            f"{x['over_gib']:.2f} GiB",
            f"{x['over_gib'] - plain['over_gib']:+.2f} GiB",
        ]
        for side, x in figures.items()
    ]
    head = f"{asked.samples} samples of {asked.sequence:,} tokens in micro-batches of one, bf16, medians of {asked.runs}; random weights."
    return [head, "", *table(("pass", "time", "over plain", "memory over the weights", "over plain"), rows)]


def measure_all(world: Any, layout: Any, asked: Any) -> dict[str, dict[str, Any]]:
    from models import batches, frozen_model

    from minitron_megatron.config.distill import Distill

    arch = shapes(tiny=asked.tiny).teacher
    given = batches(Distill(steps=1, sequence_length=asked.sequence, global_batch=asked.samples), arch.vocab, world)
    runs, found = (1 if asked.tiny else asked.runs), {}
    bare = frozen_model(arch, world, layout, None, output_layer=None)
    for side, step in passes(bare, given).items():
        found[side] = measured(step, world.platform, runs=runs).to_dict()
    del bare
    release(world.platform)
    found[LOGITS] = measured(partial(with_logits, frozen_model(arch, world, layout, None), given), world.platform, runs=runs).to_dict()
    return found


def passes(model: Any, batches: list[Any]) -> dict[str, Callable[[], Any]]:
    from minitron_megatron.importance.stage import measure
    from minitron_megatron.model.run import forward_only

    return {
        FORWARD: lambda: forward_only(model, batches, consume=lambda hidden, batch: None),
        DEFAULT: lambda: measure(model, batches, lambda: None, kept="default"),
        ALL: lambda: measure(model, batches, lambda: None),
    }


def with_logits(model: Any, batches: list[Any]) -> None:
    from minitron_megatron.model.run import forward_only

    def logits(hidden_SBD: Any, _: Any) -> None:
        model.last.output_layer(hidden_SBD, weight=model.output_weight())

    forward_only(model, batches, consume=logits)


if __name__ == "__main__":
    main()
