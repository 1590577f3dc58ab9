"""Which fused paths are said to be on follows from what is installed, and each that is not says what it costs and what brings it."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

from minitron_megatron.platform import Platform, doctor, engine, fused
from minitron_megatron.platform.activate import megatron_flags
from minitron_megatron.platform.fused import Installed, first_lines, fused_paths

NOTHING = Installed("absent", frozenset())
CUDA = Platform("cuda", "nccl", torch.device("cuda"))


def on(here: Installed) -> set[str]:
    return {path.name for path in fused_paths(here) if path.on}


def test_every_missing_path_says_its_cost_and_its_mend() -> None:
    missing = [path for path in fused_paths(NOTHING) if not path.on]
    assert len(missing) == 7 and all(path.cost and path.mend for path in missing)
    assert on(NOTHING) == {"attention", "stages' messages"}  # torch's own attention keeps no scores either


def test_transformer_engine_and_a_compiler_bring_every_path_and_apex_alone_brings_three() -> None:
    whole = Installed(None, frozenset({"triton"}))
    assert on(whole) == {path.name for path in fused_paths(whole)}
    apex = Installed("absent", frozenset({"apex", "amp_C", "fused_weight_gradient_mlp_cuda"}))
    assert on(apex) - on(NOTHING) == {"weight gradients", "Adam", "gradient norm"}
    assert on(Installed("absent", frozenset({"apex"}))) - on(NOTHING) == {"Adam"}  # without its CUDA extensions
    assert "loss" not in on(Installed(None, frozenset({"triton"}), compiles=False))


def test_the_first_lines_of_a_run_are_one_on_a_cpu_and_one_for_each_missing_path_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(first_lines(Platform("cpu", "gloo", torch.device("cpu")))) == 1
    monkeypatch.setattr(engine, "installed_version", lambda: None)
    monkeypatch.setattr(fused, "MODULES", ())
    lines = first_lines(CUDA)
    assert lines[0] == "fused: attention, stages' messages"
    assert len(lines) == 1 + 7 and all(line.startswith("not fused: ") for line in lines[1:])
    assert f"install Transformer Engine {engine.wanted_versions()}" in lines[1]
    monkeypatch.setattr(engine, "version_problem", lambda: None)  # a package of that name that does not import
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    assert "does not import: ModuleNotFoundError" in first_lines(CUDA)[1]


def test_a_machine_with_a_gpu_has_a_finding_for_each_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    findings = {found.name: found for found in doctor._fused_paths()}
    assert len(findings) == 9
    layers = findings["fused: layers"]
    assert (layers.found, layers.ok) == ("off", False) and "no FP8" in layers.follows


@pytest.fixture
def installed_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package transformer_engine 2.11.0 that raises where it is imported."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('libcublas.so.13: cannot open shared object file\\nand more')")
    info = tmp_path / "transformer_engine-2.11.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.11.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.machinery.PathFinder.invalidate_caches()
    return info


@pytest.mark.usefixtures("installed_engine")
def test_an_engine_that_does_not_import_is_not_used_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.version_problem() == "2.11.0, but torch is a CPU build" or torch.version.cuda
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert engine.version_problem() is None
    assert engine.import_problem() == "does not import: OSError: libcublas.so.13: cannot open shared object file"


def test_an_engine_of_another_version_than_megatron_wants_is_not_used(installed_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy", "transformer-engine[pytorch]<2.11; extra == 'dev'"])
    assert engine.wanted_versions() == SpecifierSet("<2.11")
    assert str(engine.version_problem()).startswith("2.11.0, but megatron-core") and str(engine.version_problem()).endswith("wants <2.11")
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["transformer-engine[pytorch]; extra == 'te'"])  # as 0.19.2's
    assert engine.wanted_versions() == SpecifierSet(engine.AT_LEAST)
    assert engine.version_problem() is None


@pytest.mark.parametrize("used", [False, True])
def test_models_are_built_of_its_modules_where_the_platform_has_them(used: bool) -> None:
    flags = megatron_flags(Platform("cuda", "nccl", torch.device("cuda"), transformer_engine=used), "swiglu")
    assert flags["transformer_impl"] == ("transformer_engine" if used else "local")
    assert flags["apply_rope_fusion"] is used
    assert megatron_flags(Platform("cpu", "gloo", torch.device("cpu")), "swiglu")["transformer_impl"] == "local"
