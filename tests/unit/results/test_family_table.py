"""The steps of a family in one table, which says what each one's figures are held against."""

from __future__ import annotations

from typing import Any

from minitron_megatron.results.family import family_result
from minitron_megatron.results.table import markdown_table


def evaluated(**kl: float) -> dict[str, Any]:
    models = {"teacher": None, **kl}
    domains = {name: {"in_domain": {"perplexity": {"value": 9.0, "stderr": 0.1}, "kl": value and {"value": value}}} for name, value in models.items()}
    return {"models": {name: {"parameters": 100, "domains": domains[name]} for name in models}, "tokens": {"in_domain": 64}, "sequence_length": 32}


def test_a_familys_table_says_that_each_steps_kl_is_to_its_own_teacher() -> None:
    text = markdown_table(family_result({"large": evaluated(pruned=2.0, distilled=0.5), "small": evaluated(pruned=3.0, distilled=0.7)}))
    assert text.splitlines()[0] == "|  | original | large pruned | large distilled | small pruned | small distilled |"
    assert "KL and agreement of each step's models are to its own teacher" in text
    assert "its own teacher" not in markdown_table(evaluated(pruned=2.0))
