"""Claims about docker/found.py: what a base brings is read off it as it is, and what follows is what docker/README.md says.

The bases are stand-ins: folders with packages of the names and versions that the real ones have, seen by a Python without any other package.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "docker"))
import found  # noqa: E402

NGC_TORCH = "2.10.0a0+b558c986e8.nv25.11"  # of nvcr.io/nvidia/pytorch:25.11-py3
NGC = found.Base((3, 12), NGC_TORCH, "/usr/local/lib/python3.12/dist-packages/torch", "13.0", "13.0", "2.9.0+70f53666", "kernels", True, True)
BARE = found.Base((3, 11))


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[..., Path]:
    """stand_in(name, version=…, source=…, folders=…): a package in the stand-in's folder, which is returned."""

    def make(name: str, *, version: str | None = None, source: str = "", folders: tuple[str, ...] = ()) -> Path:
        for folder in (name, *(f"{name}/{inner}" for inner in folders)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "__init__.py").write_text(source if folder == name else "")
        if version is not None:
            (tmp_path / f"{name}-{version}.dist-info").mkdir()
            (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        return tmp_path

    return make


def inspect(folder: Path) -> dict[str, object]:
    """What found.py reads off the stand-in, with its bin/ ahead on the path."""
    program = "import dataclasses, json, found; print(json.dumps(dataclasses.asdict(found.inspect_base())))"
    variables = {"PYTHONPATH": f"{folder}:{ROOT / 'docker'}", "PATH": f"{folder / 'bin'}:/nowhere", "CUDA_HOME": "/nowhere"}
    said = subprocess.run([sys.executable, "-S", "-c", program], env=variables, capture_output=True, text=True, check=True).stdout
    return json.loads(said)


def put_nvcc(folder: Path, release: str) -> None:
    """Prints what NVIDIA's compiler prints."""
    (folder / "bin").mkdir()
    said = f"nvcc: NVIDIA (R) Cuda compiler driver\\nCuda compilation tools, release {release}, V{release}.88\\nBuild cuda_{release}/compiler"
    (folder / "bin" / "nvcc").write_text(f"#!/bin/sh\nprintf '{said}\\n'\n")
    (folder / "bin" / "nvcc").chmod(0o755)


def test_a_bare_base_has_nothing(tmp_path: Path) -> None:
    assert inspect(tmp_path) == {
        "python": list(sys.version_info[:2]),
        **dict.fromkeys(["torch", "torch_folder", "cuda", "nvcc", "transformer_engine"]),
        "apex": "absent",
        "has_pip": False,
        "has_git": False,
    }


def test_an_image_like_nvidias_is_read_off_as_it_is(stand_in: Callable[..., Path]) -> None:
    folder = stand_in("torch", source=f"__version__ = '{NGC_TORCH}'\nclass version: cuda = '13.0'")
    stand_in("transformer_engine", version="2.9.0+70f53666", folders=("pytorch",))
    stand_in("apex", folders=("multi_tensor_apply",))
    stand_in("amp_C")
    stand_in("fused_weight_gradient_mlp_cuda")
    stand_in("pip")
    put_nvcc(folder, "13.0")
    seen = inspect(folder)
    assert (seen["torch"], seen["torch_folder"], seen["cuda"], seen["nvcc"]) == (NGC_TORCH, str(folder / "torch"), "13.0", "13.0")
    assert (seen["transformer_engine"], seen["apex"], seen["has_pip"]) == ("2.9.0+70f53666", "kernels", True)


def test_a_transformer_engine_that_does_not_import_counts_as_missing(stand_in: Callable[..., Path]) -> None:
    folder = stand_in("transformer_engine", version="2.9.0", source="import os; os._exit(3)")  # not even an exception, as a broken library may
    assert inspect(folder)["transformer_engine"] is None


@pytest.mark.parametrize(("folders", "kernels", "is_"), [((), (), "unrelated"), (("multi_tensor_apply",), ("amp_C",), "plain")])
def test_the_two_apex_are_told_apart(stand_in: Callable[..., Path], folders: tuple[str, ...], kernels: tuple[str, ...], is_: str) -> None:
    folder = stand_in("apex", folders=folders, source="raise RuntimeError('must not be imported')")
    for kernel in kernels:
        stand_in(kernel)
    assert inspect(folder)["apex"] == is_


def test_nvidias_image_is_taken_and_nothing_compiled_on_it() -> None:
    found.require_supported(NGC)
    assert not found.builds_transformer_engine(NGC)
    assert not found.builds_apex(NGC)
    assert found.lock_name(NGC) == "gpu-py312"


def test_a_bare_base_is_taken_and_nothing_compiled_on_it() -> None:
    found.require_supported(BARE)
    assert not found.builds_transformer_engine(BARE)
    assert not found.builds_apex(BARE)
    assert found.lock_name(BARE) == "cpu-py311"


@pytest.mark.parametrize("version", [None, "2.8.0", "2.12.0", "2.20.2"])
def test_transformer_engine_is_compiled_where_it_is_missing_or_megatron_refuses_it(version: str | None) -> None:
    assert found.builds_transformer_engine(replace(NGC, transformer_engine=version))
    assert not found.builds_transformer_engine(replace(NGC, transformer_engine=version, cuda=None))


@pytest.mark.parametrize("version", ["2.9.0", "2.11.0", "2.11.0+abc"])
def test_a_transformer_engine_in_range_is_kept(version: str) -> None:
    assert not found.builds_transformer_engine(replace(NGC, transformer_engine=version))


def test_apex_without_kernels_is_compiled_and_pypis_is_refused() -> None:
    assert found.builds_apex(replace(NGC, apex="plain"))
    assert found.builds_apex(replace(NGC, apex="absent"))
    assert not found.builds_apex(replace(BARE, apex="absent"))
    with pytest.raises(found.BaseError, match="unrelated web toolkit"):
        found.require_supported(replace(BARE, apex="unrelated"))


@pytest.mark.parametrize("torch", ["2.8.0", "2.14.0", "1.13.1+cu117"])
def test_a_torch_out_of_range_is_refused(torch: str) -> None:
    with pytest.raises(found.BaseError, match="choose another base"):
        found.require_supported(replace(NGC, torch=torch))


@pytest.mark.parametrize("python", [(3, 9), (3, 13)])
def test_a_python_out_of_range_is_refused(python: tuple[int, int]) -> None:
    with pytest.raises(found.BaseError, match=r"3\.10, 3\.11 or 3\.12"):
        found.require_supported(replace(NGC, python=python))


@pytest.mark.parametrize(
    ("base", "architectures", "reason"),
    [
        (replace(NGC, nvcc=None), ["9.0"], "no nvcc"),
        (replace(NGC, nvcc="12.8"), ["9.0"], r"nvcc is of CUDA 12\.8, its torch of 13\.0"),
        (NGC, ["sm_90"], "no compute capability"),
        (NGC, ["7.0", "9.0"], r"CUDA 13\.0 does not compile for 7\.0"),
        (replace(NGC, nvcc="12.4", cuda="12.4"), ["9.0", "10.0"], r"CUDA 12\.4 does not compile for 10\.0"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_its_reason(base: found.Base, architectures: list[str], reason: str) -> None:
    with pytest.raises(found.BaseError, match=reason):
        found.require_compiler(base, architectures)


def test_the_architectures_that_the_dockerfile_asks_for_compile_on_its_base() -> None:
    default = next(line for line in (ROOT / "docker" / "Dockerfile").read_text().splitlines() if line.startswith("ARG CUDA_ARCHITECTURES="))
    architectures = default.split("=", 1)[1].strip('"').split()
    assert "9.0" in architectures
    found.require_compiler(NGC, architectures)


def test_the_ranges_are_those_of_setup_py_and_megatron() -> None:
    setup = (ROOT / "setup.py").read_text()
    for name, limits in (("torch", found.TORCH), ("transformer-engine[pytorch]", found.TRANSFORMER_ENGINE)):
        low, high = (".".join(map(str, limit)) for limit in limits)
        assert f"{name}>={low},<{high}" in setup
    low, high = (".".join(map(str, limit)) for limit in found.PYTHON)
    assert f'python_requires=">={low},<{high}"' in setup
