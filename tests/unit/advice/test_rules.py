"""Every rule fires on what it is about and is silent otherwise; what the papers did themselves finds nothing serious."""

from __future__ import annotations

from typing import Any

import pytest

from minitron_megatron.advice import rules
from minitron_megatron.advice.rules import RULES, Subject, advise
from minitron_megatron.advice.text import told
from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.family import Step
from minitron_megatron.config.schema import Recipe

LLAMA_8B = Architecture(
    family_name="llama",
    layers=32,
    hidden=4096,
    heads=32,
    kv_groups=8,
    head_channels=128,
    ffn=14336,
    vocab=128256,
    tied_embeddings=False,
    max_positions=131072,
    norm_eps=1e-5,
    rope_theta=5e5,
)
WIDTH = {"hidden": 3072, "ffn": 9216}


def subject(target: dict[str, int] | None = None, step: dict[str, Any] | None = None, source: Architecture = LLAMA_8B, **sections: Any) -> Subject:
    """The papers' 8B → 4B by width, with something else where a test says so."""
    sizes = WIDTH if target is None else target
    values: dict[str, Any] = {
        "name": "llama",
        "model": {"path": "Llama-3.1-8B"},
        "data": {"train": ["*.txt"]},
        "importance": {"samples": 1024, "sequence_length": 8192},
        "prune": {"target": sizes},
        "distill": {"steps": 10_000, "sequence_length": 8192, "global_batch": 1152},
        "correct": {"steps": 10_000, "sequence_length": 8192, "global_batch": 1152, "source_peak": 3e-4},
    }
    for name, section in sections.items():
        values[name] = None if section is None else {**values.get(name, {}), **section}
    return Subject(Step(Recipe.model_validate(values), **(step or {})), source, source.resized(**sizes))


FIRING = {
    rules.too_much_at_once: subject({"hidden": 2048, "ffn": 8192}),
    rules.width_scored_otherwise: subject(prune={"target": WIDTH, "scores": "magnitude"}),
    rules.iterative_importance: subject(step={"name": "b", "before": "a", "source": "pruned"}),
    rules.depth_before_width: subject({"layers": 24}),
    rules.labels_mixed_in: subject(distill={"loss": {"forward_kl": 1.0, "cross_entropy": 0.5}}),
    rules.warm_teacher: subject(distill={"temperature": 2.0}),
    rules.depth_without_hidden_losses: subject({"layers": 16}),
    rules.hidden_losses_without_depth: subject(distill={"hidden": {}}),
    rules.squared_hidden_distance: subject({"layers": 16}, distill={"hidden": {"kind": "mse"}}),
    rules.original_instead_of_closest: subject(step={"name": "b", "before": "a", "source": "original"}),
    rules.unfinished_source: subject(model={"path": "runs/llama/iter_0001200"}),
    rules.short_calibration: subject(importance={"samples": 128}),
    rules.short_samples: subject(importance={"sequence_length": 512}),
    rules.learning_rate_too_high: subject(distill={"learning_rate": {"peak": 1e-3}}),
    rules.short_training: subject(distill={"steps": 100}),
    rules.few_teacher_classes: subject(distill={"top_k": 64}),
    rules.uncorrected_teacher: subject(correct=None),
    rules.ranks_not_settled: subject(search={"space": {"hidden": [2560, 3072]}, "short_distillation": {"rounds": [50, 100]}}),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_fires_on_what_it_is_about_and_on_nothing_that_the_papers_did(rule: rules.Rule) -> None:
    finding = rule(FIRING[rule])
    assert finding is not None and finding.mend and "P" in finding.source
    assert rule(subject()) is None


def test_the_published_width_recipe_finds_nothing() -> None:
    assert advise(subject()) == []
    assert told([]) == f"nothing against the {len(RULES)} findings that it was held against"


def test_the_published_depth_recipe_finds_nothing_serious_with_hidden_losses() -> None:
    depth = subject({"layers": 16}, distill={"hidden": {"embeddings": True}})
    assert [finding.severity for finding in advise(depth)] == ["advice"]  # width before depth


def test_the_serious_comes_first_and_each_finding_says_why_and_what_instead() -> None:
    text = told(advise(subject({"layers": 10}, distill={"temperature": 2.0})), "4b")
    first, *_, last = text.split("\n\n")
    assert first.startswith("step 4b: serious: one step keeps") and last.startswith("step 4b: advice:")
    assert text.count("why:") == text.count("mend:") == len(text.split("\n\n"))


def test_a_small_model_may_learn_faster() -> None:
    tiny = LLAMA_8B.resized(hidden=576, ffn=1536, layers=30)
    fast = {"source": tiny, "distill": {"learning_rate": {"peak": 1e-3}}}
    assert rules.learning_rate_too_high(subject({"ffn": 1024}, **fast, correct={"source_peak": 5e-3})) is None
    assert rules.learning_rate_too_high(subject({"ffn": 1024}, **fast, correct=None)) is None


def test_a_learning_rate_is_held_against_the_sources_own_peak_where_the_recipe_tells_it() -> None:
    """1e-4 is what the papers take, of a source that had more."""
    finding = rules.learning_rate_too_high(subject(correct={"source_peak": 5e-5}, distill={"learning_rate": {"peak": 1e-4}}))
    assert finding is not None and "above the source's own peak of 5e-05" in finding.what and finding.mend.endswith("peak=5e-05")


def test_calibration_that_pruning_does_not_read_is_not_held_against_anything() -> None:
    merged = subject(importance={"samples": 128, "sequence_length": 512}, prune={"target": WIDTH, "scores_file": "merged.safetensors"})
    assert rules.short_calibration(merged) is None and rules.short_samples(merged) is None


def test_an_axis_that_is_cut_is_held_against_the_best_pair_and_another_one_is_not() -> None:
    variance = {"batch": "variance", "sequence": "variance"}
    heads, ffn = ({"target": WIDTH, "aggregations": {axis: variance}} for axis in ("heads", "ffn"))
    assert rules.width_scored_otherwise(subject(prune=heads)) is None  # all heads are kept
    finding = rules.width_scored_otherwise(subject(prune=ffn))
    assert finding is not None and "(batch=variance, sequence=variance)" in finding.what
    assert finding.mend.endswith("leave prune.aggregations out")  # of one axis it stands above the others'
