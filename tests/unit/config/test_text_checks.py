"""What a recipe may ask of chats and of the teacher's own text, given the model's positions and the samples that hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.config.checks.recipe import check_recipe
from minitron_megatron.config.family import load_recipe
from minitron_megatron.errors import RecipeError

MODEL = Architecture("llama", 6, 48, 12, 4, 8, 60, 131, True, 128, 1e-6, 10000.0)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "labels={prompt_tokens: 20, new_tokens: 14}",
            [
                "labels.prompt_tokens + labels.new_tokens = 34 does not fit into a sample of distill.sequence_length + 1 = 33 tokens; "
                "raise the one or shorten the others"
            ],
        ),
        (
            "labels={prompt_tokens: 100, new_tokens: 29}",
            ["labels.prompt_tokens + labels.new_tokens = 129 is beyond the model's 128 positions; at most 128"],
        ),
        ("chat={train: [x.jsonl], sequence_length: 129}", ["chat.sequence_length=129 is beyond the model's 128 positions; at most 128"]),
        ("distill.text=chat", ["distill.text=chat: no section names the conversations; add the section chat, with chat.train"]),
        ("labels={top_p: 0}", ["labels.top_p: input should be greater than 0 (found 0)"]),
        ("chat={train: []}", ["chat.train: list should have at least 1 item after validation, not 0 (found [])"]),
    ],
)
def test_each_problem_with_its_mend(recipe_file: Callable[..., Path], override: str, expected: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(load_recipe(recipe_file(), [override]), MODEL)
    assert all(any(line.endswith(wanted) for line in caught.value.problems) for wanted in expected), caught.value.problems


def test_what_would_not_be_read_beside_conversations_is_refused(recipe_file: Callable[..., Path]) -> None:
    overrides = ["distill.text=chat", "chat={train: [x.jsonl], sequence_length: 32}", "labels={prompt_tokens: 20, new_tokens: 13}"]
    overrides += ["distill.mask_boundaries=true", "correct={steps: 100, source_peak: 1e-3, beside: true}"]
    with pytest.raises(RecipeError) as caught:
        check_recipe(load_recipe(recipe_file(), overrides), MODEL)
    for section in ("labels: what the teacher writes", "distill.mask_boundaries:", "correct.beside:"):
        assert any(line.startswith(section) for line in caught.value.problems), (section, caught.value.problems)


def test_what_fits_is_taken(recipe_file: Callable[..., Path]) -> None:
    """A text of S + 1 tokens fills a sample of S inputs and S labels."""
    check_recipe(load_recipe(recipe_file(), ["labels={prompt_tokens: 20, new_tokens: 13}", "chat={train: [x.jsonl], sequence_length: 128}"]), MODEL)
