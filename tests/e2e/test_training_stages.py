"""`minitron run` with every stage that trains: two teachers, one of them the corrected source, and a fine-tuned student that is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_megatron.arch.architecture import Architecture
from minitron_megatron.checkpoint.huggingface import HuggingFaceSource
from minitron_megatron.checkpoint.tensors import tensor_table
from minitron_megatron.checkpoint.torch_dist import MegatronSource, weights_digest

from .test_chain import start
from .tiny_model import SENTENCE, SEQUENCE, write_model, write_recipe, write_text

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}\n{% endgeneration %}"
    "{% else %}Q: {{ m.content }}\n{% endif %}{% endfor %}"
)
RUN: dict[str, Any] = {
    "steps": 6,
    "sequence_length": SEQUENCE,
    "global_batch": 4,
    "micro_batch": 2,
    "save_every_steps": 3,
    "validate_every_steps": 3,
    "validation_samples": 4,
}
RATE = {"minimum": 1e-4, "warmup_steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and output of a chain that has run."""
    folder = tmp_path_factory.mktemp("all_stages")
    write_text(folder / "text")
    write_model(folder / "model", folder / "text")
    write_model(folder / "assistant", folder / "text")
    words = SENTENCE.split()
    chats = [
        [{"role": "user", "content": " ".join(words[n % 9 :])}, {"role": "assistant", "content": " ".join(words[: n % 5 + 2])}] for n in range(40)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    (folder / "template.jinja").write_text(TEMPLATE)
    recipe = yaml.safe_load(write_recipe(folder).read_text())
    recipe["parallel"], recipe["prune"]["scores"] = {}, "random"  # what other tests look at, and this one need not wait for
    recipe["distill"] |= {"steps": 6, "hidden": {"pairs": "last_minus_2"}}
    recipe |= {
        "teachers": {"models": [{"path": "source", "weight": 0.75}, {"path": str(folder / "assistant"), "weight": 0.25}]},
        "correct": {**RUN, "source_peak": 5e-3, "learning_rate": RATE},
        "chat": {"train": [str(folder / "chats.jsonl")], "template": str(folder / "template.jinja"), "sequence_length": 2 * SEQUENCE, "workers": 1},
        "finetune": {**RUN, "sequence_length": 2 * SEQUENCE, "learning_rate": {**RATE, "peak": 1e-3}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return folder, start(path)


def result(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / "tiny" / stage / "result.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.slow
def test_every_stage_that_trains_has_its_column_and_its_place_in_the_report(finished: tuple[Path, str]) -> None:
    folder, output = finished
    assert list(result(folder, "evaluate")["models"]) == ["teacher", "pruned", "distilled", "finetuned"]
    assert "finetuned" in output
    report = (folder / "runs" / "tiny" / "report" / "report.html").read_text()
    for stage in ("teachers", "correct", "chat", "finetune"):
        assert f"minitron {stage} recipe.yaml" in report, stage


@pytest.mark.slow
def test_the_last_model_of_the_chain_is_exported(finished: tuple[Path, str]) -> None:
    """Its digest is the fine-tuned one's, and no other's."""
    folder, _ = finished
    arch = Architecture.from_dict(result(folder, "finetune")["architecture"])
    exported = HuggingFaceSource(folder / "runs" / "tiny" / "export" / "model", arch)
    trained = MegatronSource(folder / "runs" / "tiny" / "finetune" / "checkpoint", arch)
    assert all((exported.read(row) == trained.read(row)).all() for row in tensor_table(arch))
    assert weights_digest(trained) == result(folder, "finetune")["weights_sha256"]
    assert len({result(folder, stage)["weights_sha256"] for stage in ("prune", "distill", "finetune")}) == 3


@pytest.mark.slow
def test_the_teacher_that_is_compared_is_the_one_that_was_distilled_from(finished: tuple[Path, str]) -> None:
    """The corrected source's own validation gives the same perplexity as its column, on the same held-out windows."""
    folder, _ = finished
    perplexity = result(folder, "evaluate")["models"]["teacher"]["domains"]["in_domain"]["perplexity"]["value"]
    assert perplexity == pytest.approx(result(folder, "correct")["validation"]["perplexity"], rel=1e-5)
    assert result(folder, "correct")["weights_sha256"] != result(folder, "import")["weights_sha256"]
