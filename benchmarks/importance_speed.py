"""The importance pass beside a plain forward pass of the same batches and beside ModelOpt's pass; its memory beside the activations'.

SmolLM2-135M's shape with random weights, one process. Ours is importance.stage.measure, which the stage calls, on a model without its output
layer: every axis by the default aggregation, as the peer's forward loop, and every axis with the sums of all criteria and aggregations.
The peer's search is not timed. `importance_speed.py memory` takes the memory in place of the time: growth of the process's resident peak over
what it held before the pass, each side in a fresh process whose large tensors have pages of their own (holes in a heap would hide what is
used).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from common import write_result
from peer import PRUNING, ROOT, in_peer_environment

RUNS, SAMPLES, SEQUENCE = 5, 2, 1024
LONG = 4096
"""Default of importance.sequence_length: one sample of so many tokens, for the memory."""
SHAPE: dict[str, Any] = {
    "family_name": "llama",
    "layers": 30,
    "hidden": 576,
    "heads": 9,
    "kv_groups": 3,
    "head_channels": 64,
    "ffn": 1536,
    "vocab": 49_152,
    "tied_embeddings": True,
    "max_positions": 8192,
    "norm_eps": 1e-5,
    "rope_theta": 100_000.0,
}
PRECISIONS = ("fp32", "bf16")
SIDES = {
    "ours": "importance, importance.sums=default",
    "all": "importance, importance.sums=all",
    "forward": "plain forward pass, no output layer",
    "logits": "plain forward pass, with logits",
    "peer": "ModelOpt's pass",
}


def main() -> None:
    if sys.argv[2:]:
        return measure(*sys.argv[1:])
    in_peer_environment(PRUNING)
    if sys.argv[1:] == ["memory"]:
        figures = {precision: memory(precision) for precision in PRECISIONS}
        write_result("importance_memory", "Memory of the importance pass beside a plain forward pass", memory_text(figures), figures)
    else:
        figures = {precision: run("time", precision) for precision in PRECISIONS}
        write_result("importance_speed", "The importance pass beside a plain forward pass and beside ModelOpt's", text(figures), figures)


def text(figures: dict[str, Any]) -> str:
    rows = [
        f"| {precision} | {SIDES[side]} | {seconds:.2f} s | {x['ours_over'][side]:.2f} | {x['all_over'][side]:.2f} |"
        for precision, x in figures.items()
        for side, seconds in x["seconds"].items()
    ]
    return "\n".join(
        [
            f"SmolLM2-135M's shape, {SAMPLES} samples of {SEQUENCE} tokens in micro-batches of one, one process; medians of {RUNS} alternating "
            f"runs. Peer: nvidia-modelopt {PRUNING}, on megatron's own GPTModel with our norm and attention's forward passes.",
            "",
            "| precision | pass | time | default sums over it | all sums over it |",
            "|---|---|--:|--:|--:|",
            *rows,
            "",
            "The largest relative difference of the sums that both gather (default aggregation: ffn, heads, norms): "
            + ", ".join(f"{precision} {x['apart']:.1e}" for precision, x in figures.items())
            + ".",
        ]
    )


def memory_text(figures: dict[str, Any]) -> str:
    seen = ", ".join(f"{x['activations_mb']:,.0f} MB in {precision}" for precision, x in figures.items())
    rows = [
        f"| {precision} | {SIDES[side]} | {x['peak_mb'][side]:,.1f} MB | {x['extra_mb'][side]:,.1f} MB | {x['extra_share'][side]:.2%} |"
        for precision, x in figures.items()
        for side in x["peak_mb"]
    ]
    return "\n".join(
        [
            f"SmolLM2-135M's shape, one process. Peak memory above what it held before the pass, one sample of {LONG} tokens; extra: over a plain",
            f"forward pass. Its share is of the activations that are measured: {seen}.",
            "",
            "| precision | pass | peak | extra | share |",
            "|---|---|--:|--:|--:|",
            *rows,
        ]
    )


def memory(precision: str) -> dict[str, Any]:
    found = {side: run("memory", precision, side) for side in ("ours", "all", "forward")}
    peaks, activations = {side: x["peak_mb"] for side, x in found.items()}, found["ours"]["activations_mb"]
    extra = {side: peak - peaks["forward"] for side, peak in peaks.items()}
    shares = {side: value / activations for side, value in extra.items()}
    return {"peak_mb": peaks, "activations_mb": activations, "extra_mb": extra, "extra_share": shares}


def run(*arguments: str) -> dict[str, Any]:
    """A fresh process in the environment that the launcher gives to its worker, for the memory to that of a stream."""
    from minitron_megatron.launcher import worker_environment

    environment = {**os.environ, **worker_environment(1, streams=arguments[0] == "memory"), "PYTHONPATH": str(ROOT)}
    told = subprocess.run([sys.executable, __file__, *arguments], env=environment, stdout=subprocess.PIPE, check=True).stdout
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    print(*arguments, found, flush=True)
    return found


def measure(what: str, precision: str, *arguments: str) -> None:
    """One process of one run: prints its figures."""
    from minitron_megatron.platform import activate, retarget

    platform = activate("cpu")
    retarget.install(("modelopt.torch",))
    from minitron_megatron.config.parallel import Parallel
    from minitron_megatron.parallel.layout import global_layout
    from minitron_megatron.parallel.world import distributed_world

    with distributed_world(platform) as world:
        layout = global_layout(Parallel(), world)
        print(json.dumps({"time": times, "memory": peak_memory}[what](precision, layout, platform, *arguments)))


def times(precision: str, layout: Any, platform: Any) -> dict[str, Any]:
    from importance_peer import peer_model, peer_pass, peer_sums, with_hooks

    whole, bare = (make_model(precision, layout, platform, output=output) for output in (True, False))
    batches, converted = make_batches(SAMPLES, SEQUENCE), with_hooks(peer_model(whole))
    passes = {**our_passes(bare, batches), "logits": partial(with_logits, whole, batches)}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(RUNS + 1):
        for side, forward in passes.items():
            seconds[side].append(timed(forward))
        seconds["peer"].append(timed(partial(peer_pass, converted, batches)))
    medians = {side: median(found[1:]) for side, found in seconds.items()}  # the first round warms up
    over = {f"{ours}_over": {side: medians[ours] / value for side, value in medians.items()} for ours in ("ours", "all")}
    return {"seconds": medians, **over, "runs": seconds, "apart": apart(passes["ours"](), peer_sums(converted))}


def timed(forward: Callable[[], Any]) -> float:
    started = time.monotonic()
    forward()
    return time.monotonic() - started


def apart(ours: Any, gathered: dict[tuple[int, str], Any]) -> float:
    """Ours: the one block's Σ a² of a = mean |x|; relative to each axis's largest. The peer's sums are of all its rounds."""
    [sums] = ours.blocks.values()
    return max(float((sums[key][0, 1] - value / (RUNS + 1)).abs().max() / sums[key][0, 1].max()) for key, value in gathered.items())


def peak_memory(precision: str, layout: Any, platform: Any, side: str) -> dict[str, float]:
    from prune_memory import reset_peak, resident

    model = make_model(precision, layout, platform, output=False)
    our_passes(model, make_batches(1, 64))[side]()  # what is made once, at the first pass
    forward = our_passes(model, make_batches(1, LONG))[side]
    before = reset_peak()
    forward()
    return {"peak_mb": (resident("VmHWM") - before) / 1e6, "activations_mb": activation_bytes(model) / 1e6}


def activation_bytes(model: Any) -> int:
    """Of all that the hooks see of one sample: outputs of norms and heads, both ends of the FFN's inside, states between layers."""
    arch = model.architecture
    a_layer = 3 * arch.hidden + arch.heads * arch.head_channels + 2 * arch.ffn
    return LONG * (arch.layers * a_layer + 2 * arch.hidden) * next(model.parameters()).element_size()


def our_passes(model: Any, batches: list[Any]) -> dict[str, Callable[[], Any]]:
    from minitron_megatron.importance.stage import measure as importance
    from minitron_megatron.model.run import forward_only

    return {
        "ours": lambda: importance(model, batches, lambda: None, kept="default"),
        "all": lambda: importance(model, batches, lambda: None),
        "forward": lambda: forward_only(model, batches, consume=lambda hidden, batch: None),
    }


def with_logits(model: Any, batches: list[Any]) -> None:
    """As a stock GPTModel ends."""
    from minitron_megatron.model.run import forward_only

    def logits(hidden_SBD: Any, _: Any) -> None:
        model.last.output_layer(hidden_SBD, weight=model.output_weight())

    forward_only(model, batches, consume=logits)


def make_model(precision: str, layout: Any, platform: Any, *, output: bool) -> Any:
    import torch
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from minitron_megatron.arch.architecture import Architecture
    from minitron_megatron.model.build import build_model
    from minitron_megatron.model.precision import torch_dtype

    arch = Architecture(**SHAPE)
    model = build_model(arch, layout, platform, torch_dtype(precision), output_layer=ColumnParallelLinear if output else None)
    generator = torch.Generator().manual_seed(5)
    for weight in model.parameters():  # norms stay at 1
        if weight.dim() > 1:
            weight.data.normal_(0, 0.02, generator=generator)
    return model


def make_batches(samples: int, tokens: int) -> list[Any]:
    import torch

    from minitron_megatron.data.batches import collate

    text = torch.randint(SHAPE["vocab"], (samples, tokens + 1), generator=torch.Generator().manual_seed(5))
    return [collate(text, [sample]) for sample in range(samples)]


if __name__ == "__main__":
    main()
