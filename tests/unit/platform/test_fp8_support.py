"""What GPUs, CUDA and Transformer Engine can do in FP8, on machines that this one is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minitron_megatron.config.fp8 import Fp8, Scaling
from minitron_megatron.errors import PlatformError
from minitron_megatron.platform import Platform, engine
from minitron_megatron.platform.fp8_support import Fp8Machine, obstacle, obstacles, require_fp8, this_machine

H200 = Fp8Machine("NVIDIA H200", (9, 0), (13, 0), (2, 11, 0))
ALL: tuple[Scaling, ...] = ("delayed", "tensorwise", "blockwise", "mxfp8", "nvfp4")
CPU, CUDA = Platform("cpu", "gloo", torch.device("cpu")), Platform("cuda", "nccl", torch.device("cuda"))


@pytest.mark.parametrize(
    ("capability", "able"),
    [
        ((8, 0), ()),
        ((8, 6), ()),
        ((8, 9), ("delayed", "tensorwise")),
        ((9, 0), ("delayed", "tensorwise", "blockwise")),
        ((10, 0), ALL),
        ((12, 0), ("delayed", "tensorwise", "blockwise", "nvfp4")),
    ],
)
def test_each_generation_has_its_scalings(capability: tuple[int, int], able: tuple[str, ...]) -> None:
    """The table of Transformer Engine 2.11's own checks."""
    machine = replace(H200, capability=capability)
    assert tuple(scaling for scaling in ALL if obstacle(scaling, machine) is None) == able


@pytest.mark.parametrize(
    ("scaling", "changed", "reason"),
    [
        ("delayed", {"capability": (8, 0), "gpu": "A100"}, "A100 (sm_80) multiplies in no FP8"),
        ("tensorwise", {"transformer_engine": None}, "FP8 on a GPU is Transformer Engine's (absent); install the extra gpu"),
        ("tensorwise", {"transformer_engine": (2, 1, 0)}, "asks for Transformer Engine 2.2 or newer, 2.1.0 is installed"),
        ("blockwise", {"transformer_engine": (2, 2, 5)}, "asks for Transformer Engine 2.3 or newer"),
        ("nvfp4", {"capability": (10, 0), "transformer_engine": (2, 6, 0)}, "asks for Transformer Engine 2.7 or newer"),
        ("blockwise", {"cuda": (12, 8)}, "came with CUDA 12.9, torch was built with 12.8"),
        ("blockwise", {"capability": (8, 9)}, "before Hopper (sm_90)"),
        ("mxfp8", {}, "before Blackwell (sm_100), whose matrix units alone scale such blocks; use blockwise or tensorwise"),
        ("mxfp8", {"capability": (8, 9)}, "use tensorwise"),
        ("mxfp8", {"capability": (12, 0)}, "one layout alone"),
        ("delayed", {"capability": (8, 9), "cuda": (12, 0)}, "Ada needs CUDA 12.1"),
    ],
)
def test_what_is_missing_is_told_with_the_mend(scaling: Scaling, changed: dict[str, object], reason: str) -> None:
    assert reason in str(obstacle(scaling, replace(H200, **changed)))  # type: ignore[arg-type]  # fields of several types


def test_both_models_are_asked_and_named() -> None:
    found = obstacles(Fp8(teacher="mxfp8", student="nvfp4"), H200)
    assert [line.split(":")[0] for line in found] == ["fp8.teacher=mxfp8", "fp8.student=nvfp4"]
    assert obstacles(Fp8(teacher="blockwise", student="delayed"), H200) == []


def test_a_cpu_takes_an_emulation_alone() -> None:
    with pytest.raises(PlatformError, match=r"which multiplies in no FP8; set fp8.emulated=true"):
        require_fp8(Fp8(student="delayed"), CPU)
    require_fp8(Fp8(student="delayed", emulated=True), CPU)
    require_fp8(None, CPU)


def test_an_emulation_beside_transformer_engine_is_refused() -> None:
    with pytest.raises(PlatformError, match=r"its own layers are used here; set fp8.emulated=false"):
        require_fp8(Fp8(student="delayed", emulated=True), replace(CUDA, transformer_engine=True))
    require_fp8(Fp8(student="delayed", emulated=True), CUDA)


def test_this_machine_is_read_from_torch_and_the_installed_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(engine, "installed_version", lambda: "2.11.0+c188b53")
    monkeypatch.setattr(engine, "import_problem", lambda: "does not import: a library is missing")
    assert replace(this_machine(replace(CUDA, transformer_engine=True)), engine_problem="absent") == H200
    with pytest.raises(PlatformError, match=r"fp8.student=delayed: FP8 on a GPU is Transformer Engine's \(does not import: a library is missing\)"):
        require_fp8(Fp8(student="delayed"), CUDA)
