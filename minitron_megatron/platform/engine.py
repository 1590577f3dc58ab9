"""Whether this process can use Transformer Engine, in the versions that the installed megatron-core was made for."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

NAMES = ("transformer-engine", "transformer_engine", "transformer-engine-torch")
"""As which distribution it may be installed."""
AT_LEAST = ">=2.9"
"""Where megatron-core's own requirement names no versions (0.19.2): what 0.16.1 asks for at least; nothing older was read."""


def installed_version() -> str | None:
    """Of Transformer Engine, read without importing it; None where it is absent."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    for name in NAMES:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def wanted_versions() -> SpecifierSet:
    """The range that megatron-core's metadata names: `<2.12.0,>=2.9.0a0` for 0.16.1."""
    requirements = [Requirement(line) for line in importlib.metadata.requires("megatron-core") or ()]
    named = [found.specifier for found in requirements if found.name == NAMES[0] and found.specifier]
    return named[0] if named else SpecifierSet(AT_LEAST)


def version_problem() -> str | None:
    """Why its modules are not for this installation, in a few words; None where they are. Imports nothing."""
    version = installed_version()
    if version is None:
        return "absent"
    if not wanted_versions().contains(version, prereleases=True):
        return f"{version}, but megatron-core {importlib.metadata.version('megatron-core')} wants {wanted_versions()}"
    if torch.version.cuda is None:
        return f"{version}, but torch is a CPU build"
    return None


def import_problem() -> str | None:
    """The same, or why it does not import; for processes on CUDA, which import it anyway."""
    problem = version_problem()
    if problem:
        return problem
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a missing library of CUDA's, another torch than it was built for: it raises what it likes
        return f"does not import: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None
