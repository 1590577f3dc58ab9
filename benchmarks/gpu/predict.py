"""What a distillation step should take on one H200, counted by hand before it is measured: docs/performance.md holds the output.

Each line is multiply-adds over a rate or bytes over a bandwidth; nothing overlaps. The rates are those of RATES, with the reason for each.

    bash benchmarks/gpu/run.sh predict --device cpu
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, NamedTuple

from options import command_line
from planned import H200, TOKENS_OF_A_STEP, memory_of, plan_of, settings_of, step_flops
from shapes import BF16, PRECISIONS, Precision, precision, shapes
from writer import table

from minitron_megatron.arch.architecture import Architecture, layer_costs, parameter_count
from minitron_megatron.plan.activations import Pass, kept_by_layer
from minitron_megatron.plan.loss import loss_memory
from minitron_megatron.plan.memory import TrainingPlan
from minitron_megatron.plan.work import attention_flops

GIB = 2**30


class Rates(NamedTuple):
    """What is counted on, of the H200's data sheet (989 and 1979 TFLOP/s dense, 4.8 TB/s)."""

    bf16: float = 0.71 * 989e12
    """Products of 8192³ were seen at 770 to 798 TFLOP/s on such a card; these have fewer rows."""
    fp8: float = 0.62 * 1979e12
    """Per-tensor scales: the share that products of 4096 to 8192 rows reach in published tables of cuBLAS."""
    fp8_blockwise: float = 0.50 * 1979e12
    """Partial sums are scaled and added outside the tensor cores."""
    attention_forward: float = 550e12
    """Causal, 128 channels: FlashAttention-3's published figures of an H100 (arXiv 2407.08608) at 4,096 to 8,192 tokens. Where flash-attn is
    absent, as in tests/gpu/pack.sh, cuDNN's kernels run: that paper finds them a little slower there, later versions are not in it."""
    attention_backward: float = 450e12
    memory: float = 0.83 * 4.8e12
    """A copy was seen at 4.3 TB/s; kernels of several inputs reach less."""


RATES = Rates()


@dataclass(frozen=True)
class Part:
    """A line of the count; amount in multiply-adds (counted as two) or bytes."""

    name: str
    amount: float
    unit: str
    rate: float

    @property
    def seconds(self) -> float:
        return self.amount / self.rate


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--sequences", nargs="+", type=int, default=[4096, 8192])
    asked = parser.parse_args()
    print("\n".join(page(asked)))


def page(asked: argparse.Namespace) -> list[str]:
    found = {(name, sequence): Step.of(name, sequence, tiny=asked.tiny) for sequence in asked.sequences for name in PRECISIONS}
    first = found[BF16, asked.sequences[0]]
    tensorwise = found["tensorwise", asked.sequences[0]]
    return [
        f"One step: {TOKENS_OF_A_STEP:,} tokens in micro-batches of one sample, all layers, sequences of {asked.sequences[0]:,}.",
        "",
        *table(("part", "amount", "rate", "bf16", "tensorwise"), part_rows(first, tensorwise)),
        "",
        *table(("precision", "sequence", "step", "tokens/s", "MFU (bf16 peak)", "over bf16", "planned GiB"), step_rows(found)),
    ]


def part_rows(bf16: Step, fp8: Step) -> list[list[str]]:
    others = {part.name: part for part in fp8.parts}
    rows = []
    for part in [*bf16.parts, *(part for part in fp8.parts if part.name not in {x.name for x in bf16.parts})]:
        known = part in bf16.parts
        amount = f"{part.amount / 1e12:,.1f} TFLOP" if part.unit == "flop" else f"{part.amount / 1e9:,.1f} GB"
        rate = f"{part.rate / 1e12:,.0f} TFLOP/s" if part.unit == "flop" else f"{part.rate / 1e12:.2f} TB/s"
        other = others.get(part.name)
        rows.append([part.name, amount, rate, ms(part.seconds) if known else "–", ms(other.seconds) if other else "–"])
    return [*rows, ["**sum**", "", "", ms(bf16.seconds), ms(fp8.seconds)]]


def step_rows(found: dict[tuple[str, int], Step]) -> list[list[str]]:
    return [
        [
            name,
            str(sequence),
            f"{step.seconds:.3f} s",
            f"{step.tokens / step.seconds:,.0f}",
            f"{step.flops / step.seconds / H200.gpu.flops['bf16']:.0%}",
            f"{found[BF16, sequence].seconds / step.seconds:.2f}" if name != BF16 else "–",
            f"{step.planned / GIB:.0f}",
        ]
        for (name, sequence), step in found.items()
    ]


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


@dataclass(frozen=True)
class Step:
    parts: list[Part]
    flops: float
    """What the task asks for."""
    tokens: int
    planned: int
    """Bytes at the fullest moment, as `minitron plan` counts them."""

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @staticmethod
    def of(name: str, sequence: int, *, tiny: bool = False) -> Step:
        models, settings, chosen = shapes(tiny=tiny), settings_of(sequence), precision(name, emulated=False)
        plan = plan_of(models.teacher, models.width, settings, chosen)
        return Step(parts(plan, chosen), step_flops(plan), settings.global_batch * sequence, memory_of(plan).total)


def parts(plan: TrainingPlan, chosen: Precision, rates: Rates = RATES) -> list[Part]:
    """Everything that the step does, in the order of its size."""
    return [*products(plan, chosen, rates), *attention(plan, rates), *around(plan, chosen, rates), *loss(plan, rates), *optimizer(plan, rates)]


def products(plan: TrainingPlan, chosen: Precision, rates: Rates) -> list[Part]:
    [teacher], tokens = plan.teachers, tokens_of(plan)
    of_teacher, of_student = (2.0 * tokens * sum(layer_costs(run.split.arch)) for run in (teacher.run, plan.run))
    return [
        Part("teacher's layers, forward", of_teacher, "flop", product_rate(chosen.teacher, rates)),
        Part("student's layers, forward", of_student, "flop", product_rate(chosen.student, rates)),
        Part("student's layers, both gradients", 2 * of_student, "flop", product_rate(chosen.student, rates)),
    ]


def product_rate(fp8: Any, rates: Rates) -> float:
    if fp8 is None:
        return rates.bf16
    return rates.fp8_blockwise if fp8.scaling == "blockwise" else rates.fp8


def attention(plan: TrainingPlan, rates: Rates) -> list[Part]:
    """Five products backward, of which one computes the scores again, for two forward."""
    [teacher], number = plan.teachers, plan.micro_batches
    of_teacher, of_student = (number * run.split.arch.layers * attention_flops(run) for run in (teacher.run, plan.run))
    return [
        Part("attention, both models forward", of_teacher + of_student, "flop", rates.attention_forward),
        Part("attention, student backward", 2.5 * of_student, "flop", rates.attention_backward),
    ]


def around(plan: TrainingPlan, chosen: Precision, rates: Rates) -> list[Part]:
    """What a layer keeps is written and read once forward; backward its gradients as well. Gradients of weights are added to fp32 sums in the
    product's own kernel (4 + 4 bytes a weight and micro-batch), which hides none of it where products are counted at what they reach alone."""
    number = plan.micro_batches
    once = {name: number * sum(kept_by_layer(run, width) for width in run.split.arch.ffn_widths) for name, run in runs(plan).items()}
    gradients = 8.0 * number * sum(layer_costs(plan.run.split.arch))
    found = [
        Part("norms, rotary, gates, additions: teacher", 2.0 * once["teacher"], "byte", rates.memory),
        Part("norms, rotary, gates, additions: student", 6.0 * once["student"], "byte", rates.memory),
        Part("gradients of weights added up", gradients, "byte", rates.memory),
    ]
    casts = cast_bytes(plan, chosen)
    return [*found, Part("FP8 casts", casts, "byte", rates.memory)] if casts else found


def runs(plan: TrainingPlan) -> dict[str, Pass]:
    [teacher] = plan.teachers
    return {"teacher": teacher.run, "student": plan.run}


def cast_bytes(plan: TrainingPlan, chosen: Precision) -> float:
    """Inputs of the four products of a layer: read for the largest value (not with delayed scaling or in blocks) and for the cast (2 bytes each),
    written row-wise (1), in training column-wise too (1). In training their outputs' gradients likewise; the student's weights once a step, where
    they are not FP8 themselves. None of it is taken to be fused with a norm or a gate: the most that casts can cost."""
    tokens, found = tokens_of(plan), 0.0
    if chosen.teacher:
        found += tokens * inputs(plan.teachers[0].run.split.arch) * (looks(chosen.teacher) + 2 + 1)
    if chosen.student:
        arch, each = plan.run.split.arch, looks(chosen.student) + 2 + 2
        found += tokens * (inputs(arch) + outputs(arch)) * each
        found += sum(layer_costs(arch)) * (0 if chosen.student.weights else each)
    return found


def looks(fp8: Any) -> int:
    """Bytes of the pass that finds the largest value before the cast."""
    return 2 if fp8.scaling == "tensorwise" else 0


def inputs(arch: Architecture) -> int:
    """Values a token that go into the products of all layers."""
    return sum(2 * arch.hidden + arch.heads * arch.head_channels + width for width in arch.ffn_widths)


def outputs(arch: Architecture) -> int:
    return sum(arch.qkv_rows + 2 * arch.hidden + 2 * width for width in arch.ffn_widths)


def loss(plan: TrainingPlan, rates: Rates) -> list[Part]:
    """Logits of both and both gradients; over them one pass for the sums and one for the gradient (10 bytes a logit), and the weight's gradient:
    made in bf16 and added in fp32 for each chunk (12 bytes), zeroed, scaled and handed over for each micro-batch (24 bytes)."""
    [teacher], tokens, run = plan.teachers, tokens_of(plan), plan.run
    rows, hidden = run.split.vocabulary_rows, run.split.arch.hidden
    flops = 2.0 * tokens * rows * (teacher.run.split.arch.hidden + 3 * hidden)
    chunks = -(-run.tokens // loss_memory(plan.settings, run, teachers=1).tokens) * plan.micro_batches
    over_logits, over_weight = 10.0 * tokens * rows, rows * hidden * (12.0 * chunks + 24.0 * plan.micro_batches)
    return [
        Part("KD loss: products", flops, "flop", rates.bf16),
        Part("KD loss: passes over logits", over_logits, "byte", rates.memory),
        Part(f"KD loss: gradient of the output weight ({chunks} chunks)", over_weight, "byte", rates.memory),
    ]


def optimizer(plan: TrainingPlan, rates: Rates) -> list[Part]:
    """Adam reads gradient, main weight and moments and writes the last three (28 bytes) and the bf16 weight (2); gradients are zeroed and
    their norm is taken (8)."""
    return [Part("optimizer", 38.0 * parameter_count(plan.run.split.arch), "byte", rates.memory)]


def tokens_of(plan: TrainingPlan) -> int:
    return plan.micro_batches * plan.run.tokens


if __name__ == "__main__":
    main()
