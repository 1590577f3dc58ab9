"""Tasks through lm-eval: accuracy and standard error equal a hand computation, offline, with a silent console."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path

import pytest

from minitron_megatron.errors import DataError
from minitron_megatron.tasks.accuracy import task_accuracies, task_files_outside

EOD = 0
METRICS = ("acc", "acc_norm")
# (question, choices, right one): every choice's log-likelihood below is known by its first letter
ITEMS = [
    ("A one", ["yes", "noooooooooo"], 0),
    ("A two", ["yes", "noooooooooo"], 1),
    ("A three ", ["yes", "noooooooooo"], 1),
    ("", ["yes", "noooooooooo"], 0),
]
LOGLIKELIHOOD = {"y": -2.0, "n": -3.0}  # acc: always "yes"; acc_norm: -2/3 against -3/11, always "no…"


def _tokenize(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def _loglikelihoods(pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    return [(LOGLIKELIHOOD[_text(continuation).strip()[0]], False) for _, continuation in pairs]


def _text(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = [json.dumps(dict(zip(("question", "choices", "answer"), item, strict=True))) for item in ITEMS]
    (tmp_path / "items.jsonl").write_text("\n".join(lines) + "\n")
    return _write_task(tmp_path)


def _write_task(folder: Path, **changes: str) -> Path:
    metrics = ", ".join(f"{{metric: {name}, aggregation: mean, higher_is_better: true}}" for name in METRICS)
    fields = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": "{data_files: {test: %s}}" % (folder / "items.jsonl"),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": f"[{metrics}]",
    }
    path = folder / "tiny.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in {**fields, **changes}.items()))
    return path


def _standard_error(right: list[int]) -> float:
    mean = sum(right) / len(right)
    return math.sqrt(sum((score - mean) ** 2 for score in right) / (len(right) - 1) / len(right))


def _accuracies(path: Path, items: int | None = None) -> dict[str, dict[str, dict[str, float | None]]]:
    return task_accuracies([str(path)], items=items, tokenize=_tokenize, eod=EOD, loglikelihoods=_loglikelihoods)


def test_accuracy_and_error_equal_a_hand_computation(task: Path, capfd: pytest.CaptureFixture[str]) -> None:
    figures = _accuracies(task)
    assert list(figures) == ["tiny"]
    assert figures["tiny"]["acc"]["value"] == pytest.approx(0.5)
    assert figures["tiny"]["acc"]["stderr"] == pytest.approx(_standard_error([1, 0, 0, 1]))
    assert figures["tiny"]["acc_norm"]["value"] == pytest.approx(0.5)
    assert figures == _accuracies(task), "a second call gives the same figures"
    assert capfd.readouterr() == ("", "")


def test_a_limit_takes_the_first_items(task: Path) -> None:
    figures = _accuracies(task, items=3)["tiny"]
    assert figures["acc"]["value"] == pytest.approx(1 / 3)
    assert figures["acc_norm"]["value"] == pytest.approx(2 / 3)
    assert figures["acc_norm"]["stderr"] == pytest.approx(_standard_error([0, 1, 1]))


def test_one_item_has_no_standard_error(task: Path) -> None:
    assert _accuracies(task, items=1)["tiny"]["acc"] == {"value": 1.0, "stderr": None}


def test_the_model_is_asked_once_with_the_boundary_rule(task: Path) -> None:
    asked: list[list[tuple[list[int], list[int]]]] = []

    def loglikelihoods(pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        asked.append(pairs)
        return _loglikelihoods(pairs)

    task_accuracies([str(task)], items=None, tokenize=_tokenize, eod=EOD, loglikelihoods=loglikelihoods)
    (pairs,) = asked
    assert len(pairs) == 8
    assert (_text(pairs[0][0]), _text(pairs[0][1])) == ("A one", " yes")
    assert _text(pairs[4][0]) == "A three", "trailing spaces of the context belong to the continuation"
    assert _text(pairs[4][1]).endswith(" yes")
    assert pairs[6][0] == [EOD], "an empty context is the end-of-document token"


def test_no_network_is_asked_for(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert _accuracies(task)["tiny"]["acc"]["value"] == pytest.approx(0.5)


def test_an_error_of_the_model_is_not_blamed_on_the_task(task: Path) -> None:
    def broken(_: object) -> list[tuple[float, bool]]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        task_accuracies([str(task)], items=None, tokenize=_tokenize, eod=EOD, loglikelihoods=broken)


def test_files_outside_are_the_yaml_its_includes_its_functions_and_the_data(task: Path) -> None:
    folder = task.parent
    (folder / "docs.py").write_text("def same(docs):\n    return docs\n")
    child = folder / "child.yaml"
    child.write_text("include: tiny.yaml\ntask: child\nprocess_docs: !function docs.same\n")
    assert task_files_outside([str(child)]) == sorted([child, task, folder / "docs.py", folder / "items.jsonl"])
    assert list(_accuracies(child)) == ["child"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "generate_until"}, "output_type is generate_until; only"),
        ({"dataset_path": "baber/piqa"}, "asks a hub for its data"),
        ({"dataset_kwargs": "{data_files: {test: nowhere.jsonl}}"}, "data file nowhere.jsonl does not exist"),
        ({"doc_to_target": "'{{no_such_field.x}}'"}, "lm-eval cannot use this task"),
        ({"test_split": "train"}, "lm-eval cannot use this task"),
        ({"task": "[one, two]"}, "groups of tasks are not supported"),
        ({"metric_list": "[{"}, "no valid YAML"),
    ],
)
def test_a_users_mistake_is_one_line_that_names_the_file(task: Path, changes: dict[str, str], message: str) -> None:
    _write_task(task.parent, **changes)
    with pytest.raises(DataError) as error:
        _accuracies(task)
    assert message in str(error.value)
    assert str(task) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_task_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such task file"):
        task_files_outside([str(tmp_path / "absent.yaml")])
