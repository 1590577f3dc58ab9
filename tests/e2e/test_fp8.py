"""`minitron run` with emulated FP8: a word on the command line, and everything behind the distillation is as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_megatron.checkpoint.torch_dist import TorchDistReader

from .test_chain import BEFORE_DISTILL, STAGES, start
from .tiny_model import write_model, write_recipe, write_text

FP8 = ("fp8.teacher=tensorwise", "fp8.student=delayed", "fp8.amax_history=4", "fp8.emulated=true")


def distilled(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "tiny" / "distill" / "result.json").read_text())  # type: ignore[no-any-return]


def ids(folder: Path) -> dict[str, str]:
    """Of every artifact."""
    manifests = (folder / "runs" / "tiny").glob("*/manifest.json")
    return {path.parent.name: json.loads(path.read_text())["id"] for path in manifests}


@pytest.mark.slow
def test_a_chain_runs_in_emulated_fp8_after_one_without_and_only_what_trains_and_follows_is_made_anew(tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    write_model(tmp_path / "model", tmp_path / "text")
    path = write_recipe(tmp_path)
    recipe = yaml.safe_load(path.read_text())
    recipe["parallel"], recipe["prune"]["scores"] = {}, "random"  # what other tests look at, and this one need not wait for
    recipe["distill"] |= {"steps": 6}
    path.write_text(yaml.safe_dump(recipe))
    start(path)
    plain, before = distilled(tmp_path), ids(tmp_path)
    output = start(path, *FP8)
    rounded, after = distilled(tmp_path), ids(tmp_path)
    assert "distill 6/6" in output
    assert [stage for stage in STAGES if after[stage] == before[stage]] == list(BEFORE_DISTILL)
    assert rounded["validation"]["forward_kl"] != plain["validation"]["forward_kl"]
    assert rounded["validation"]["forward_kl"] == pytest.approx(plain["validation"]["forward_kl"], rel=0.2)  # six steps of a tiny model
    published = TorchDistReader(tmp_path / "runs" / "tiny" / "distill" / "checkpoint").tensors
    assert not [name for name in published if "fp8" in name]
    assert (tmp_path / "runs" / "tiny" / "report" / "report.html").is_file()
