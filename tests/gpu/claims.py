"""What is claimed of the GPU, group by group; ground.py: how much of it is measured where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .compare import (
    Measure,
    beside_local,
    curve_distance,
    differing_tensors,
    distance,
    figure,
    figure_distance,
    gradient_distance,
    mean_kl,
    other_steps,
    ratio,
    score_distance,
    share,
    units_beyond,
)
from .ground import Ground
from .setting import Run, Setting
from .verdict import Claim

BF16, FP32 = 1e-2, 1e-5
E4M3_ROUNDING = "two operands of 3 bits of mantissa, each off by 2.6 % on average: together 3.7 %, sums average it out no further"
E5M2_ROUNDING = "a gradient of 2 bits of mantissa, off by 5.2 % on average, times an operand of 3 bits: 5.8 %"
ROUNDED_AT_ALL, ANOTHER_AT_ALL = 1e-2, 1e-9
"""What FP8 that is silently off falls short of: a linear in bf16 is some 3e-3 off, and a run beside itself nothing."""
MOVED = 0.3
"""Of all scales: half of those that a pass uses."""


CPU_FP32 = Setting("cpu", "local", "fp32")
"""The reference of everything."""


def first(ground: Ground) -> list[Claim]:
    """One linear. Whatever fails here fails everywhere."""
    claims = []
    for scaling in ground.scalings:
        run = Run.of("linear", ground.setting(fp8=scaling))
        bounds = {"output": (5e-2, E4M3_ROUNDING), "input": (8e-2, E5M2_ROUNDING), "weight": (8e-2, E5M2_ROUNDING)}
        least = ROUNDED_AT_ALL if ground.device == "cuda" else 0.0  # a CPU's linear is a plain one
        claims += [
            Claim("first", f"one FP8 linear, {scaling}: {name}, against fp64 of the same values", (run,), figure(name), bound, why, at_least=least)
            for name, (bound, why) in bounds.items()
        ]
    return claims


def parity(ground: Ground) -> list[Claim]:
    """bf16 on the device against fp32 on the CPU, and checkpoints between the layer specs."""
    device = ground.setting().device
    ours, local, exact = (ground.outputs(setting, gradients=True) for setting in (ground.setting(), Setting(device, "local"), CPU_FP32))
    why = "twice what bf16 on a CPU, where no Transformer Engine is, was measured to be off on SmolLM2: "
    bounded: dict[str, tuple[Measure, float, str]] = {
        "logits": (distance("logits"), 3e-2, why + "1.7e-2"),
        "loss": (figure_distance("loss"), 2e-3, "errors of single tokens average out: 1.4e-4 in bf16 on a CPU"),
        "loss of the training pass": (figure_distance("fused_loss"), 2e-3, "as the loss"),
        "gradients": (gradient_distance, 9e-2, why + "4.7e-2"),
    }
    found = [
        Claim("parity", f"bf16 on {device} against fp32 on CPU: {name}", (ours, exact), measure, bound, reason, house=ground.house)
        for name, (measure, bound, reason) in bounded.items()
    ]
    beside = "the local layers round as often; a quarter for kernels that add in another order"
    return found + [
        Claim(
            "parity",
            f"{name}: distance from fp32 ÷ that of the local layers",
            (ours, local, exact),
            beside_local(of),
            1.25,
            beside,
            house=ground.house,
        )
        for name, of in (("logits", distance("logits")), ("gradients", gradient_distance))
    ]


def checkpoints(ground: Ground) -> list[Claim]:
    specs = ["te", "local", "te"] if ground.device == "cuda" else ["local", "local"]
    run = Run.of("round_trip", ground.setting(), house=ground.house_folder, specs=specs)
    name = f"checkpoints written and loaded as {' → '.join(specs)}: tensors with other bits"
    return [Claim("checkpoints", name, (run,), differing_tensors, 0, "nothing is computed", house=ground.house)]


def fp8(ground: Ground) -> list[Claim]:
    """Distillations in FP8 beside the one in bf16, and the frozen teacher's logits."""
    plain = ground.distilled(ground.setting(), ground.steps)
    several = f"mean loss of each {ground.window} of {ground.steps} steps, against bf16"
    reason = "what is asked of FP8: 2 %; the same samples in the same order"

    def trained(name: str, scaling: str, **given: object) -> Claim:
        run = ground.distilled(ground.setting(fp8=scaling), ground.steps, **given)
        return Claim(
            "fp8", f"{name}: {several}", (run, plain), curve_distance(ground.window), 0.02, reason, house=ground.house, at_least=ANOTHER_AT_ALL
        )

    claims = [trained(f"student {scaling}", scaling) for scaling in ground.scalings]
    claims += [trained(f"teacher and student {scaling}", scaling, teacher=scaling) for scaling in ground.teachers[:1]]
    return claims + teachers(ground)


def teachers(ground: Ground) -> list[Claim]:
    plain = ground.outputs(ground.setting())
    return [
        Claim(
            "fp8",
            f"teacher with FP8 weights, {scaling}: KL of its logits to those in bf16, nats a token",
            (ground.outputs(ground.setting(fp8=scaling), weights=True), plain),
            mean_kl,
            ground.teacher_kl,
            "small beside the KL that a distillation ends with (0.4 and more): what it teaches is the same",
            house=ground.house,
            at_least=ANOTHER_AT_ALL,
        )
        for scaling in ground.teachers
    ]


def resume(ground: Ground) -> list[Claim]:
    """Delayed scaling is the one with a memory: its amax history and scales are in the checkpoint."""
    steps, setting = ground.resumed_steps, ground.setting(fp8="delayed", deterministic=True)
    whole, interrupted = (ground.distilled(setting, steps, **given) for given in ({}, {"pauses": [steps // 2]}))
    name = f"FP8 delayed, deterministic: {steps} steps in two starts against one; losses, norms and weights with other bits"
    exact = Claim("resume", name, (interrupted, whole), other_steps, 0, "the design: a resumed run reproduces the run to the bit", house=ground.house)
    why = "or there was nothing to bring back; Transformer Engine keeps scales for products' outputs too, which stay 1: two of five"
    moved = "FP8 delayed: share of the scales in the checkpoint of its pause that are no longer 1"
    return [exact, Claim("resume", moved, (interrupted,), figure("scales_moved"), 1, why, house=ground.house, at_least=MOVED)]


def memory(ground: Ground) -> list[Claim]:
    sizes = {"model": ground.big, "layers": ground.layers, "length": ground.length}
    plain = Run.of("memory", ground.setting(), **sizes)
    return [
        Claim(
            "memory",
            f"FP8 teacher, {scaling}, at the shape of {ground.big}: its bytes {when}, ÷ bf16",
            (Run.of("memory", ground.setting(fp8=scaling), **sizes), plain),
            ratio(name),
            0.6,
            "what is asked of an FP8 teacher; embedding and output layer stay in bf16: 9.1 of 16.1 GB",
        )
        for scaling in ground.teachers
        for name, when in (("weights", "as built"), ("behind_a_pass", "behind a forward pass"))
    ]


def importance(ground: Ground) -> list[Claim]:
    """The design's tolerances: bf16 1e-2, fp32 1e-5; a unit whose score lies within them of the cut may change sides."""
    cpu = ground.scores(CPU_FP32)

    def pair(name: str, first: Run, second: Run, tolerance: float) -> list[Claim]:
        why = f"the design: {tolerance:g}"
        kept = f"importance, {name}: units kept by one side alone, away from the cut"
        return [
            Claim("importance", f"importance, {name}: scores", (first, second), score_distance, tolerance, why, house=ground.house),
            Claim("importance", kept, (first, second), units_beyond(tolerance), 0, why, house=ground.house),
        ]

    runs = {precision: ground.scores(ground.setting(precision=precision)) for precision in ("bf16", "fp32")}
    claims = [claim for precision, run in runs.items() for claim in pair(f"{precision} against fp32 on CPU", run, cpu, _tolerance(precision))]
    if ground.device == "cuda":
        for precision, run in runs.items():
            local = ground.scores(ground.setting(precision=precision, spec="local"))
            claims += pair(f"{precision}, TE against the local spec", run, local, _tolerance(precision))
    return claims


def _tolerance(precision: str) -> float:
    return {"bf16": BF16, "fp32": FP32}[precision]


def loss(ground: Ground) -> list[Claim]:
    sizes = dict(zip(("tokens", "hidden", "vocabulary"), ground.loss_size, strict=True))
    run = Run.of("loss", ground.setting(), **sizes, memory_mib=8)
    why = "logits are rounded to bf16: those that matter are about 8 and off by 0.01 to 0.02, and so are their probabilities, relative"
    claims = [
        Claim("loss", f"fused KD loss in bf16, {name}, against whole fp64 logits", (run,), figure(part), bound, why)
        for name, part, bound in (
            ("value", "value", BF16),
            ("gradient of the states", "hidden", 2 * BF16),
            ("gradient of the weight", "weight", 2 * BF16),
        )
    ]
    big = dict(zip(("tokens", "hidden", "vocabulary"), ground.loss_peak_size, strict=True))
    peak = Run.of("loss_memory", ground.setting(), **big, memory_mib=ground.loss_peak_mib)
    shown = "{tokens:,} tokens × {hidden} × {vocabulary:,}".format(**big)

    reason = (
        f"{ground.loss_peak_mib} MiB of chunks + the gradients (kd_loss.expected_bytes); 5 % for numbers of a token each and the allocator's rounding"
    )
    return [*claims, Claim("loss", f"fused KD loss, {shown}: peak memory ÷ formula", (peak,), share("peak", "expected"), 1.05, reason)]


def on_smollm2(ground: Ground) -> list[Claim]:
    """The same on a real model. Blockwise scaling cannot be: its blocks are 128 wide, and SmolLM2's 576 channels are no multiple of that."""
    real = replace(
        ground,
        house_name="smollm2",
        samples=4,
        length=256,
        training=("distill.global_batch=16", "distill.micro_batch=16", "distill.sequence_length=512", "distill.save_every_steps=1000"),
        scalings=tuple(scaling for scaling in ground.scalings if scaling != "blockwise"),
        teachers=tuple(scaling for scaling in ground.teachers if scaling != "blockwise"),
    )
    found = [*parity(real), *fp8(real), *importance(real)]
    return [replace(claim, group="smollm2", name=f"SmolLM2-135M: {claim.name}") for claim in found]


GROUPS: dict[str, Callable[[Ground], list[Claim]]] = {
    "first": first,
    "parity": parity,
    "checkpoints": checkpoints,
    "fp8": fp8,
    "resume": resume,
    "memory": memory,
    "importance": importance,
    "loss": loss,
    "smollm2": on_smollm2,
}
