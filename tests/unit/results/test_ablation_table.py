"""Mean and spread over seeds, the standard error of one run, and a best variant only where the difference is more than the spreads."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minitron_megatron.results.ablation import Run, ablation_result, best_variants, columns_of, console_ablation, markdown_ablation, publish_ablation


def evaluated(
    kl: float, *, parameters: int = 900, stderr: float = 0.01, model: str = "pruned", acc: float | None = None, teacher: float = 20.0
) -> Any:
    def figures(perplexity: float, kl: dict[str, float] | None, acc: float | None) -> dict[str, Any]:
        tasks = {} if acc is None else {"piqa": {"acc": {"value": acc, "stderr": 0.02}, "items": 100}}
        domain = {"perplexity": {"value": perplexity, "stderr": 0.5}, "kl": kl, "top1_agreement": kl}
        return {"domains": {"in_domain": domain}, "tasks": tasks}

    return {
        "models": {
            "teacher": {"parameters": 1000, **figures(teacher, None, None if acc is None else 0.7)},
            model: {"parameters": parameters, **figures(20 * math.exp(kl), {"value": kl, "stderr": stderr}, acc)},
        },
        "tokens": {"in_domain": 4096},
        "sequence_length": 512,
        "task_items": 100,
    }


def seeded(*kls: float, **more: Any) -> list[Run]:
    return [(seed, evaluated(kl, **more)) for seed, kl in enumerate(kls)]


def best(result: dict[str, Any], column: str = "kl, in_domain") -> set[str]:
    return best_variants(result, next(item for item in columns_of(result) if item.name == column))


def test_several_seeds_give_mean_and_sample_standard_deviation_and_one_the_standard_error() -> None:
    result = ablation_result("x", {"many": seeded(1.0, 1.2, 1.7), "one": [(None, evaluated(2.0, stderr=0.03))]})
    many, one = (result["variants"][name]["figures"]["kl, in_domain"] for name in ("many", "one"))
    assert (many["value"], many["spread"]) == (pytest.approx(1.3), pytest.approx(statistics.stdev([1.0, 1.2, 1.7])))
    assert many["spread_is"] == "standard deviation over seeds" and many["values"] == [1.0, 1.2, 1.7]
    assert (one["value"], one["spread"], one["spread_is"]) == (2.0, 0.03, "standard error of the measurement")
    text = markdown_ablation(result)
    assert "± is the sample standard deviation over seeds where there are several, else one standard error of the measurement" in text
    assert "| many | 3 | 900 | **1.30 ± 0.36** |" in text and "| one | – | 900 | 2.000 ± 0.030 |" in text
    assert "| teacher | – | 1.0\u00a0k | – | 20.00 ± 0.50 |" in text


def test_the_best_is_marked_only_where_it_is_better_than_each_other_by_more_than_both_spreads() -> None:
    def of(a: float, b: float, stderr: float) -> set[str]:
        return best(ablation_result("x", {"a": [(None, evaluated(a, stderr=stderr))], "b": [(None, evaluated(b, stderr=stderr))]}))

    # two errors of 0.05 are 0.0707 together
    assert of(1.0, 1.075, 0.05) == {"a"} and of(1.075, 1.0, 0.05) == {"b"}
    assert of(1.0, 1.065, 0.05) == set()
    assert of(1.0, 1.0, 0.0) == set() and of(1.0, 5.0, float("nan")) == set() and of(1.0, float("nan"), 0.0) == set()
    third = {"a": seeded(1.0, 1.0), "b": seeded(1.2, 1.2), "noisy": seeded(0.8, 1.3)}
    assert best(ablation_result("x", third)) == set()


def test_a_seed_without_a_figure_leaves_its_variant_without_a_spread_and_the_others_their_table() -> None:
    result = ablation_result("x", {"a": seeded(1.0, float("nan")), "b": seeded(2.0, 2.1)})
    assert math.isnan(result["variants"]["a"]["figures"]["kl, in_domain"]["spread"])
    assert "| a | 2 | 900 | not finite |" in markdown_ablation(result) and best(result) == set()


def test_variants_of_other_sizes_are_not_held_against_each_other() -> None:
    runs = {"small": seeded(2.0, parameters=500), "other": seeded(3.0, parameters=503), "large": seeded(1.0, parameters=900)}
    assert best(ablation_result("x", runs)) == {"small"}


def test_a_task_is_better_when_it_is_higher() -> None:
    result = ablation_result("x", {"a": seeded(1.0, acc=0.8), "b": seeded(2.0, acc=0.6)})
    assert best(result, "acc, piqa") == {"a"} and best(result) == {"a"}
    assert "piqa, acc (%)" in markdown_ablation(result) and "**80.0 ± 2.0**" in markdown_ablation(result)


def test_the_kl_to_another_teacher_is_left_out() -> None:
    result = ablation_result("x", {"a": seeded(1.0), "other_teacher": seeded(0.1, teacher=60.0)})
    assert list(result["variants"]["other_teacher"]["figures"]) == ["perplexity, in_domain"]
    assert best(result) == set()


def test_variants_that_end_at_different_models_say_which(tmp_path: Path) -> None:
    result = publish_ablation("x", {"before": seeded(2.0), "after": seeded(1.0, model="distilled")}, tmp_path)
    text = (tmp_path / "ablation.md").read_text()
    assert "| before (pruned) |" in text and "| after (distilled) |" in text and "Figures of the" not in text
    assert "Figures of the pruned model." in markdown_ablation(ablation_result("x", {"a": seeded(2.0)}))
    assert json.loads((tmp_path / "ablation.json").read_text()) == json.loads(json.dumps(result))
    console = Console(width=160, record=True)
    console.print(console_ablation(result))
    shown = console.export_text()
    assert "after (distilled)" in shown and "[bold]" not in shown
