"""Each rule holds one step against one finding.

Sources: P1 = arXiv 2407.14679 (its ten best practices: section 4), P2 = arXiv 2408.11796.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from minitron_megatron.arch.architecture import Architecture, parameter_count
from minitron_megatron.config.criteria import AggregatedAxis, Aggregations
from minitron_megatron.config.family import Step
from minitron_megatron.config.schema import Recipe

PUBLISHED_PEAK = 2e-4
"""The highest learning rate of the published runs (P1: 2e-4, P2 Table 4: 1e-4)."""
LIGHT_RETRAINING_TOKENS = 1.8e9
"""P1's shortest retraining, the one that ranks candidates (section 4.2)."""
SETTLED_STEPS = 300
"""Of P1's retraining of candidates, after which their order stays."""
LARGE = 1e9
"""Parameters from which the papers' figures are about the model at hand."""
WIDTH_BEFORE_DEPTH = 15.6e9
"""P1 best practice 4 is for models of at most 15 B: those of Nemotron-4."""


@dataclass(frozen=True)
class Subject:
    """What a rule looks at: one step, and what goes in and comes out."""

    step: Step
    source: Architecture
    target: Architecture

    @property
    def recipe(self) -> Recipe:
        return self.step.recipe

    @property
    def kept_depth(self) -> float:
        return self.target.layers / self.source.layers


@dataclass(frozen=True)
class Finding:
    """What the recipe does, why that costs, who found it, and the change that mends it."""

    severity: Literal["serious", "advice"]
    what: str
    why: str
    source: str
    mend: str


Rule = Callable[[Subject], Finding | None]


def too_much_at_once(subject: Subject) -> Finding | None:
    """More than half is cut in one step."""
    kept = parameter_count(subject.target) / parameter_count(subject.source)
    if kept >= 0.5:
        return None
    return Finding(
        "serious",
        f"one step keeps {kept:.0%} of the parameters",
        "the 4B model pruned from the distilled 8B one is better than the one pruned from 15B in one step",
        "P1 best practices 1 and 8",
        "make it a family of steps that each keep more than half: family: [{name: …}, {name: …}]",
    )


def width_scored_otherwise(subject: Subject) -> Finding | None:
    """A cut axis is ranked by something else than activations under (L2, mean)."""
    prune = subject.recipe.prune
    pairs = {(prune.ranking.of(axis).batch, prune.ranking.of(axis).sequence) for axis in _cut_axes(subject)}
    others = sorted(pairs - {("l2", "mean")})
    if prune.scores == "activation" and not others:
        return None
    how = (
        ", ".join(f"(batch={batch}, sequence={sequence})" for batch, sequence in others) if prune.scores == "activation" else f"{prune.scores} scores"
    )
    return Finding(
        "serious" if prune.scores != "activation" else "advice",
        f"units are ranked by {how}",
        "(batch=L2, sequence=mean) has the lowest loss on the 8T set of the nine pairs, 7.18 against 7.21 to 10.55",
        "P1 Table 11, best practice 2",
        "prune.scores=activation prune.aggregation.batch=l2 prune.aggregation.sequence=mean"
        + (", and leave prune.aggregations out" if prune.aggregations != Aggregations() else ""),
    )


def _cut_axes(subject: Subject) -> list[AggregatedAxis]:
    """Those of which the step keeps a part."""
    fields: dict[AggregatedAxis, tuple[str, ...]] = {
        "ffn": ("ffn",),
        "heads": ("heads", "kv_groups"),
        "channels": ("hidden",),
        "experts": ("experts",),
    }
    return [axis for axis, sizes in fields.items() if any(getattr(subject.target, size) < getattr(subject.source, size) for size in sizes)]


def iterative_importance(subject: Subject) -> Finding | None:
    """Importance is measured again before any training."""
    if subject.step.source != "pruned":
        return None
    return Finding(
        "advice",
        f"step {subject.step.name} measures importance anew on a model that was pruned and not trained",
        "one, two and four rounds end at the same loss, 1.92, after 1.8 B tokens: the further rounds bring nothing",
        "P1 Table 12, best practice 3",
        "prune in one step",
    )


def depth_before_width(subject: Subject) -> Finding | None:
    """Layers go although width could."""
    if subject.kept_depth == 1 or parameter_count(subject.source) > WIDTH_BEFORE_DEPTH:
        return None
    return Finding(
        "advice",
        f"layers are dropped ({subject.source.layers} → {subject.target.layers})",
        "at equal size the narrower model is better (MMLU 60.5 against 58.7), the shallower one faster (2.7 against 1.8 times)",
        "P1 best practice 4, P2 Table 1",
        "cut width (prune.target.hidden, ffn, heads) unless latency decides",
    )


def labels_mixed_in(subject: Subject) -> Finding | None:
    """Cross-entropy beside the teacher."""
    if not subject.recipe.distill.loss.get("cross_entropy"):
        return None
    return Finding(
        "advice",
        f"distill.loss mixes the labels in ({dict(subject.recipe.distill.loss)})",
        "KL alone ends at a loss of 2.107, KL with cross-entropy at 2.117",
        "P1 best practice 5",
        "distill.loss=forward_kl",
    )


def warm_teacher(subject: Subject) -> Finding | None:
    """A temperature other than 1."""
    if subject.recipe.distill.temperature == 1:
        return None
    return Finding(
        "advice",
        f"distill.temperature={subject.recipe.distill.temperature}",
        "a temperature of 1 was best",
        "P1 section 4",
        "distill.temperature=1",
    )


def depth_without_hidden_losses(subject: Subject) -> Finding | None:
    """Much of the depth goes, and the logits alone are compared."""
    if subject.kept_depth > 0.75 or subject.recipe.distill.hidden is not None:
        return None
    return Finding(
        "serious",
        f"{1 - subject.kept_depth:.0%} of the depth is cut and hidden states are not compared",
        "with half of the depth the loss goes from 2.155 (logits) to 2.141 with hidden states and embeddings",
        "P1 best practice 6",
        "distill.hidden.embeddings=true",
    )


def hidden_losses_without_depth(subject: Subject) -> Finding | None:
    """Hidden states are compared where hardly a layer goes."""
    if subject.kept_depth <= 0.9 or subject.recipe.distill.hidden is None:
        return None
    return Finding(
        "advice",
        "hidden states are compared although the depth is hardly cut",
        "the logits alone are enough then, and the step is cheaper",
        "P1 best practice 7",
        "leave distill.hidden out",
    )


def squared_hidden_distance(subject: Subject) -> Finding | None:
    """Another loss than cosine on hidden states."""
    hidden = subject.recipe.distill.hidden
    if hidden is None or hidden.kind == "cosine":
        return None
    return Finding(
        "advice", f"distill.hidden.kind={hidden.kind}", "cosine was the best loss on hidden states", "P1 section 4", "distill.hidden.kind=cosine"
    )


def original_instead_of_closest(subject: Subject) -> Finding | None:
    """A step goes back to the original past a closer model."""
    if subject.step.source != "original" or not subject.step.before:
        return None
    return Finding(
        "advice",
        f"step {subject.step.name} prunes the original although {subject.step.before} is closer in size",
        "the closer the source, the better what is pruned from it",
        "P1 best practice 8",
        "source: previous, teacher: original",
    )


def unfinished_source(subject: Subject) -> Finding | None:
    """The source's path looks like that of an intermediate checkpoint."""
    path = subject.recipe.model.path
    if subject.step.before or not re.search(r"(iter|step|checkpoint)[-_]?\d+", path):
        return None
    return Finding(
        "advice",
        f"model.path={path} looks like a checkpoint from the middle of a training",
        "of a model trained in several phases the checkpoint of the last one is to be pruned",
        "P1 best practice 10",
        "name the finished model",
    )


def short_calibration(subject: Subject) -> Finding | None:
    """Fewer samples than the papers' 1024."""
    importance = subject.recipe.importance
    if importance.samples >= 1024 or not subject.recipe.prune.reads_importance:
        return None
    return Finding(
        "advice",
        f"importance.samples={importance.samples}",
        "the papers measure on 1024 samples; the margins in the scores file show which cuts fewer samples leave to chance",
        "P1 section 4, P2 section 3.2",
        "importance.samples=1024",
    )


def short_samples(subject: Subject) -> Finding | None:
    """Calibration on shorter samples than the training's."""
    importance, training = subject.recipe.importance, subject.recipe.distill.sequence_length
    if importance.sequence_length >= min(training, 2048) or not subject.recipe.prune.reads_importance:
        return None
    return Finding(
        "advice",
        f"importance.sequence_length={importance.sequence_length} is shorter than what is trained on ({training})",
        "what matters only far into a document has no score",
        "P2 Table 4: sequences of 8192 throughout",
        f"importance.sequence_length={min(training, 2048)}",
    )


def learning_rate_too_high(subject: Subject) -> Finding | None:
    """A peak above the source's own where the recipe tells it, or, for a model of their size, above all published ones."""
    peak, correct = subject.recipe.distill.learning_rate.peak, subject.recipe.correct
    own = correct.source_peak if correct else None
    above_own = own is not None and peak > own
    if not above_own and (peak <= PUBLISHED_PEAK or parameter_count(subject.source) < LARGE):
        return None
    return Finding(
        "serious",
        f"distill.learning_rate.peak={peak:g}" + (f" is above the source's own peak of {own:g}" if above_own else ""),
        "the published runs peak at 1e-4 to 2e-4, at or below the source's own peak: above it the source's knowledge goes",
        "P1 section 4, P2 Table 4",
        f"distill.learning_rate.peak={min(1e-4, own or 1e-4):g}",
    )


def short_training(subject: Subject) -> Finding | None:
    """Fewer tokens than even P1's ranking of candidates takes."""
    distill = subject.recipe.distill
    tokens = distill.steps * distill.global_batch * distill.sequence_length
    if tokens >= LIGHT_RETRAINING_TOKENS:
        return None
    return Finding(
        "advice",
        f"the student trains on {tokens / 1e9:.3g} B tokens",
        "the papers train on 94 to 380 B; even to rank candidates they take 1.8 B, because the order before is not the order after",
        "P1 section 4 and best practice 9, P2 Table 4",
        "raise distill.steps or distill.global_batch",
    )


def few_teacher_classes(subject: Subject) -> Finding | None:
    """At most 100 of the teacher's tokens."""
    top_k = subject.recipe.distill.top_k
    if top_k is None or top_k > 100:
        return None
    return Finding(
        "serious",
        f"distill.top_k={top_k}",
        "with 100 of the teacher's tokens or fewer the student is worse",
        "P1 section 4",
        "leave distill.top_k out, or take 512 and more",
    )


def uncorrected_teacher(subject: Subject) -> Finding | None:
    """A large source of other data teaches without correction."""
    of_others = subject.source.family_name != "nemotron" and parameter_count(subject.source) >= LARGE
    if subject.recipe.correct is not None or not of_others or subject.step.before:
        return None
    return Finding(
        "advice",
        "the teacher is not fine-tuned on the distillation data",
        "where that is not the data it was trained on, correction lowers the student's validation loss by more than 6 %",
        "P2 section 2.1",
        "add a section correct: {source_peak: …}",
    )


def ranks_not_settled(subject: Subject) -> Finding | None:
    """Candidates are ranked before their order stays."""
    search = subject.recipe.search
    if search is None or search.short_distillation.rounds[-1] >= SETTLED_STEPS:
        return None
    return Finding(
        "advice",
        f"candidates of the search are trained for {search.short_distillation.rounds[-1]} steps",
        "their order changes until about 300 steps: the best right after pruning is not the best after training",
        "P1 best practice 9",
        "search.short_distillation.rounds=[100, 200, 400]",
    )


RULES: tuple[Rule, ...] = (
    too_much_at_once,
    width_scored_otherwise,
    iterative_importance,
    depth_before_width,
    labels_mixed_in,
    warm_teacher,
    depth_without_hidden_losses,
    hidden_losses_without_depth,
    squared_hidden_distance,
    original_instead_of_closest,
    unfinished_source,
    short_calibration,
    short_samples,
    learning_rate_too_high,
    short_training,
    few_teacher_classes,
    uncorrected_teacher,
    ranks_not_settled,
)


def advise(subject: Subject) -> list[Finding]:
    """What all rules found, the serious first."""
    findings = [finding for rule in RULES if (finding := rule(subject)) is not None]
    return sorted(findings, key=lambda finding: finding.severity != "serious")
