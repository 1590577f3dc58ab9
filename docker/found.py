"""What a base image brings of torch, CUDA, Transformer Engine and apex, and what follows for the image on top of it.

Standard library only: it runs in the base, before anything is installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

TORCH = ((2, 9), (2, 14))
"""From, and up to but without: setup.py's range."""

TRANSFORMER_ENGINE = ((2, 9), (2, 12))
"""What megatron-core 0.16.1 takes."""

PYTHON = ((3, 10), (3, 13))

SMALLEST_ARCHITECTURE = {11: (3, 5), 12: (5, 0), 13: (7, 5)}
"""By CUDA's major version."""

BLACKWELL, BLACKWELL_FROM = (10, 0), (12, 8)
"""The compute capability, and the first CUDA that compiles for it."""


class BaseError(Exception):
    """The base cannot carry the image; the message says what, and how to mend it."""


@dataclass(frozen=True)
class Base:
    """One base image. Versions as they are written, None where a thing is absent."""

    python: tuple[int, int]
    torch: str | None = None
    torch_folder: str | None = None
    cuda: str | None = None
    """Of torch's build; None: a CPU build."""
    nvcc: str | None = None
    transformer_engine: str | None = None
    apex: str = "absent"
    """absent, kernels (NVIDIA's, with those megatron calls), plain (NVIDIA's without) or unrelated (PyPI's web toolkit)."""
    has_pip: bool = False
    has_git: bool = False


def inspect_base() -> Base:
    """The base that this very Python belongs to."""
    torch = _import("torch")
    return Base(
        python=sys.version_info[:2],
        torch=torch.__version__ if torch else None,
        torch_folder=torch.__path__[0] if torch else None,
        cuda=torch.version.cuda if torch else None,
        nvcc=_nvcc_version(),
        transformer_engine=_transformer_engine_version(),
        apex=_apex(),
        has_pip=importlib.util.find_spec("pip") is not None,
        has_git=shutil.which("git") is not None,
    )


def require_supported(base: Base) -> None:
    """Raises BaseError where the project does not run on the base's Python or torch, or where PyPI's package apex lies there."""
    if not PYTHON[0] <= base.python < PYTHON[1]:
        raise BaseError(f"the base's Python is {base.python[0]}.{base.python[1]}; choose a base with 3.10, 3.11 or 3.12 (--build-arg BASE=…)")
    if base.torch is not None and not _within(base.torch, TORCH):
        raise BaseError(f"the base's torch is {base.torch}; >=2.9,<2.14 is supported: choose another base (--build-arg BASE=…) or one without")
    if base.apex == "unrelated":
        raise BaseError("the base holds PyPI's apex, an unrelated web toolkit that megatron takes for NVIDIA's: choose another base")


def lock_name(base: Base) -> str:
    """Of the file in requirements/, such as gpu-py312."""
    return f"{'gpu' if base.cuda else 'cpu'}-py{base.python[0]}{base.python[1]}"


def builds_transformer_engine(base: Base) -> bool:
    """Whether it is missing where it can be used, or is of a version that megatron-core refuses."""
    return base.cuda is not None and (base.transformer_engine is None or not _within(base.transformer_engine, TRANSFORMER_ENGINE))


def builds_apex(base: Base) -> bool:
    """Whether NVIDIA's kernels are missing where they can be used."""
    return base.cuda is not None and base.apex != "kernels"


def require_compiler(base: Base, architectures: list[str]) -> None:
    """Raises BaseError where nvcc is absent, is not of torch's CUDA (apex refuses that) or does not know an architecture."""
    if base.nvcc is None:
        raise BaseError("apex or Transformer Engine is to be compiled and the base has no nvcc: choose one that has it (often named …-devel)")
    if base.nvcc != base.cuda:
        raise BaseError(f"the base's nvcc is of CUDA {base.nvcc}, its torch of {base.cuda}: choose a base where they are the same")
    cuda = version_numbers(base.nvcc)
    for architecture in architectures:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", architecture):
            raise BaseError(f"CUDA_ARCHITECTURES: '{architecture}' is no compute capability; write, for example, \"8.0 9.0 10.0\"")
        capability = version_numbers(architecture)
        if capability < SMALLEST_ARCHITECTURE.get(cuda[0], (0,)) or (capability >= BLACKWELL and cuda < BLACKWELL_FROM):
            raise BaseError(f"CUDA_ARCHITECTURES: CUDA {base.nvcc} does not compile for {architecture}; leave it out, or choose another base")


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers: (2, 10, 0) of 2.10.0a0+b558c986e8.nv25.11."""
    found = re.match(r"\d+(\.\d+)*", version)
    if found is None:
        raise BaseError(f"'{version}' is no version")
    return tuple(int(number) for number in found[0].split("."))


def _within(version: str, limits: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    return limits[0] <= version_numbers(version)[:2] < limits[1]


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _nvcc_version() -> str | None:
    nvcc = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc"))
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else None


def _transformer_engine_version() -> str | None:
    """None too where it is there and does not import: another process tries, because a broken one may end it."""
    try:
        version = importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return None
    tried = subprocess.run([sys.executable, "-c", "import transformer_engine.pytorch"], capture_output=True, check=False)
    return version if tried.returncode == 0 else None


def _apex() -> str:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "absent"
    if not any((Path(place) / "multi_tensor_apply").is_dir() for place in spec.submodule_search_locations or ()):
        return "unrelated"
    wanted = ("fused_weight_gradient_mlp_cuda", "amp_C")
    return "kernels" if all(importlib.util.find_spec(name) for name in wanted) else "plain"
