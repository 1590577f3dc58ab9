"""One source of rows: what Markdown shows is what the console shows, with two digits of each standard error."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from minitron_megatron.results.table import (
    console_table,
    continuations,
    markdown_table,
    model_names,
    note,
    quantity,
    rows,
    short_count,
)


def _model(parameters: int, kl: float | None, text: str) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "domains": {
            "in_domain": {
                "perplexity": {"value": 19.7034, "stderr": 0.3012},
                "kl": None if kl is None else {"value": kl, "stderr": 0.0123},
                "top1_agreement": None if kl is None else {"value": 0.7421, "stderr": 0.0031},
            }
        },
        "tasks": {"piqa": {"acc": {"value": 0.61, "stderr": 0.0489}}},
        "tokens_per_second": 512.34,
        "continuation": text,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "models": {
            "teacher": _model(134515008, None, " is strong"),
            "pruned": _model(97389504, 1.9342, "a | b `c`\n<d>"),
            "distilled": _model(97389504, 0.3121, ""),
        },
        "prompt": "The state of our Union",
        "tokens": {"in_domain": 24576},
        "task_items": {"piqa": 100},
        "sequence_length": 512,
    }


@pytest.mark.parametrize(
    ("value", "stderr", "shown"),
    [
        (19.7034, 0.3012, "19.70 ± 0.30"),
        (0.31209, 0.00723, "0.3121 ± 0.0072"),
        (0.5, 0.0996, "0.50 ± 0.10"),
        (124310.0, 3021.0, "124,300 ± 3,000"),
        (131.44, 12.3, "131 ± 12"),
        (-0.00012, 0.00051, "−0.00012 ± 0.00051"),
        (0.61, None, "0.6100"),
        (0.0, 0.0, "0.000"),
        (float("inf"), 0.1, "not finite"),
    ],
)
def test_a_quantity_has_two_digits_of_its_standard_error(value: float, stderr: float | None, shown: str) -> None:
    assert quantity({"value": value, "stderr": stderr}) == shown


def test_a_figure_that_does_not_apply_is_a_dash() -> None:
    assert quantity(None) == "–"


def test_counts_have_a_unit() -> None:
    shown = [short_count(count).replace("\u00a0", " ") for count in (8_030_261_248, 134_515_008, 35_136, 7)]
    assert shown == ["8.03 B", "134.5 M", "35.1 k", "7"]


def test_markdown_is_this_table(result: dict[str, Any]) -> None:
    assert markdown_table(result).replace("\u00a0", " ").splitlines() == [
        "|  | teacher | pruned | distilled |",
        "| :-- | --: | --: | --: |",
        "| Parameters | 134.5 M | 97.4 M (−27.6 %) | 97.4 M (−27.6 %) |",
        "| Perplexity, in domain ↓ | 19.70 ± 0.30 | 19.70 ± 0.30 | 19.70 ± 0.30 |",
        "| KL to the teacher (nats/token), in domain ↓ | – | 1.934 ± 0.012 | 0.312 ± 0.012 |",
        "| Top-1 agreement (%), in domain ↑ | – | 74.21 ± 0.31 | 74.21 ± 0.31 |",
        "| piqa, acc (%) ↑ | 61.0 ± 4.9 | 61.0 ± 4.9 | 61.0 ± 4.9 |",
        "| Forward tokens/s ↑ | 512 | 512 | 512 |",
        "",
        "Held out: 24,576 tokens in domain, in windows of 512; task items: 100 of piqa; ± is one standard error.",
    ]


def test_the_console_shows_the_same_rows(result: dict[str, Any]) -> None:
    text = io.StringIO()
    Console(file=text, width=140).print(console_table(result))
    for row in rows(result):
        assert row.heading in text.getvalue()
        assert all(cell in text.getvalue() for cell in row.cells)


def test_the_table_fits_a_terminal_of_100_columns(result: dict[str, Any]) -> None:
    text = io.StringIO()
    Console(file=text, width=100).print(console_table(result))
    assert all(cell in text.getvalue() for row in rows(result) for cell in row.cells)


def test_without_tasks_and_second_domain_there_are_no_such_rows(result: dict[str, Any]) -> None:
    for model in result["models"].values():
        model["tasks"] = {}
    labels = [row.label for row in rows(result)]
    assert not any("out of domain" in label or "piqa" in label for label in labels)
    assert model_names(result) == ["teacher", "pruned", "distilled"]


@pytest.mark.parametrize(("items", "said"), [(100, "tasks: first 100 items"), ("all", "tasks: all items")])
def test_the_note_says_how_many_items_of_every_task(result: dict[str, Any], items: int | str, said: str) -> None:
    assert said in note({**result, "task_items": items})


def test_continuations_are_one_line_each_and_cannot_break_the_markdown(result: dict[str, Any]) -> None:
    assert continuations(result).splitlines() == [
        "Continuations of `The state of our Union`",
        "",
        "- teacher: `is strong`",
        "- pruned: `a | b 'c' <d>`",
    ]
