"""Claims about `doctor`: it names what follows, tells the two apex apart, and survives machines that lack things."""

from __future__ import annotations

import importlib.machinery
import io
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from minitron_megatron.platform import doctor


def finding(name: str) -> doctor.Finding:
    (found,) = [found for found in doctor.inspect_machine() if found.name == name]
    return found


@pytest.fixture
def apex_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package `apex`, empty."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.machinery.PathFinder.invalidate_caches()
    return tmp_path / "apex"


def test_every_finding_says_what_follows_soon() -> None:
    started = time.monotonic()
    findings = doctor.inspect_machine()
    assert time.monotonic() - started < 15
    assert all(found.found and found.follows for found in findings)
    assert len({found.name for found in findings}) == len(findings) == 14


@pytest.mark.skipif(torch.cuda.is_available(), reason="the claim is about machines without a GPU")
def test_without_a_gpu_it_says_what_is_refused() -> None:
    assert finding("GPU") == doctor.Finding("GPU", "none", "runs on CPU over gloo; FP8 can only be emulated", ok=False)


def test_the_unrelated_apex_of_pypi_is_told_from_nvidias(apex_at: Path) -> None:
    assert finding("apex").found == "PyPI's apex, not NVIDIA's"
    assert "pip uninstall apex" in finding("apex").follows
    (apex_at / "multi_tensor_apply").mkdir()
    assert finding("apex").found.startswith("NVIDIA's")


def test_a_machine_that_lacks_everything_gives_findings_and_no_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "_available_memory_bytes", lambda: 1 / 0)
    assert finding("SLURM").found == "absent"
    assert finding("containers").found == "none"
    assert finding("memory").found.startswith("could not be read: ZeroDivisionError")


def test_a_slurm_that_hangs_does_not_hang_the_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("sinfo", "srun"):
        (tmp_path / command).write_text("#!/bin/sh\nexec /bin/sleep 30\n")
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    started = time.monotonic()
    assert "sinfo does not answer" in finding("SLURM").found
    assert time.monotonic() - started < 15


def test_megatron_is_not_imported() -> None:
    program = "import sys; from minitron_megatron.platform import doctor; doctor.inspect_machine(); print('megatron.core' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


def test_the_table_shows_brackets_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(doctor.doctor_table([doctor.Finding("part", "[found]", "what [follows]", ok=False)]))
    shown = console.file.getvalue()
    assert "[found]" in shown
    assert "what [follows]" in shown


def test_a_machine_without_a_gpu_is_in_order() -> None:
    assert doctor.exit_code([doctor.Finding("GPU", "none", "runs on CPU", ok=False)]) == 0
    assert doctor.exit_code([doctor.Finding("megatron-core", "absent", "mend", ok=False, broken=True)]) == 1


@pytest.fixture
def two_gpus_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a container sees whose driver is too old for its CUDA build of torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "_gpu_devices", lambda: [Path("/dev/nvidia0"), Path("/dev/nvidia1")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nPlease update it")

    monkeypatch.setattr(torch.cuda, "init", refuse)


@pytest.mark.usefixtures("two_gpus_out_of_reach")
def test_gpus_that_torch_cannot_use_are_disorder_with_the_drivers_reason() -> None:
    gpu = finding("GPU")
    assert gpu.broken
    assert gpu.found == "2 in /dev, none usable"
    assert "too old (found version 12040)." in gpu.follows
    assert doctor.exit_code([gpu]) == 1


@pytest.mark.usefixtures("two_gpus_out_of_reach")
def test_gpus_that_are_hidden_on_purpose_or_meet_a_cpu_build_are_no_disorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert finding("GPU").found == "none"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not finding("GPU").broken
    assert "install a CUDA build" in finding("GPU").follows


def test_the_command_ends_with_the_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from minitron_megatron.cli import app

    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    monkeypatch.setattr(doctor, "inspect_machine", lambda: [doctor.Finding("apex", "PyPI's", "uninstall", ok=False, broken=True)])
    broken = CliRunner().invoke(app, ["doctor"])
    assert (broken.exit_code, "broken" in broken.stdout) == (1, True)
