"""What docker/Dockerfile installs, as lists of commands that follow from what the base has (found.py).

    python3 install.py wheels    compiles Transformer Engine's torch extension and NVIDIA's apex, where the base has CUDA and lacks them
    python3 install.py packages  the environment: the locked packages, those wheels, and torch where the base has none
    python3 install.py project   the project itself; fails where anything that it asks for is missing or of another version
    python3 install.py check     torch is still the base's, and what is installed imports

--dry-run prints the commands. Where things lie, and the Dockerfile's arguments, come from the environment. Exit code 2: the base cannot carry
the image, or an argument is wrong. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from found import Base, BaseError, builds_apex, builds_transformer_engine, inspect_base, lock_name, require_compiler, require_supported

OWN_WHEELS = re.compile(r"transformer[-_]engine", re.IGNORECASE)
"""Lines of a lock that `wheels` sees to."""


@dataclass(frozen=True)
class Command:
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join([*(f"{name}={value}" for name, value in self.environment.items()), *self.words])


@dataclass(frozen=True)
class Settings:
    """The Dockerfile's arguments and folders."""

    environment: Path
    """The virtual environment; it sees what the base has."""
    wheels: Path
    locks: Path
    source: Path
    architectures: list[str]
    apex_repository: str
    apex_commit: str
    torch_version: str
    torch_index: str
    extras: str
    jobs: int

    @property
    def python(self) -> str:
        return str(self.environment / "bin" / "python")

    @property
    def record(self) -> Path:
        """What the base had, for `check` and for whoever looks into the image."""
        return self.environment.parent / "base.json"

    @property
    def held(self) -> Path:
        """A constraint file: torch as it is in the image."""
        return self.environment.parent / "torch.txt"


COMPILE_ALL = """\
import compileall, py_compile, sys
mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
compileall.compile_dir(sys.argv[1], quiet=2, workers=0, invalidation_mode=mode)  # some packages hold files that are meant to be wrong
"""


def read_settings(variables: Mapping[str, str]) -> Settings:
    return Settings(
        environment=Path(variables.get("MINITRON_ENVIRONMENT", "/opt/minitron/venv")),
        wheels=Path(variables.get("MINITRON_WHEELS", "/wheels")),
        locks=Path(variables.get("MINITRON_LOCKS", "/opt/minitron/build/requirements")),
        source=Path(variables.get("MINITRON_SOURCE", "/opt/minitron/build/source")),
        architectures=variables.get("CUDA_ARCHITECTURES", "8.0 9.0 10.0").replace(";", " ").split(),
        apex_repository=variables.get("APEX_REPOSITORY", "https://github.com/NVIDIA/apex"),
        apex_commit=variables.get("APEX_COMMIT", ""),
        torch_version=variables.get("TORCH_VERSION", ""),
        torch_index=variables.get("TORCH_INDEX_URL", ""),
        extras=variables.get("EXTRAS", ""),
        jobs=int(variables.get("BUILD_JOBS") or os.cpu_count() or 1),
    )


def plan_wheels(base: Base, settings: Settings) -> list[Command]:
    """What is to be compiled, and how; nothing on a base without CUDA, or with both."""
    engine, apex = builds_transformer_engine(base), builds_apex(base)
    if not (engine or apex):
        return []
    require_compiler(base, settings.architectures)
    lock = _lock(base, settings)
    tools = _pins(lock, ["pip", "setuptools", "wheel", "packaging", "ninja", "pybind11"])
    commands = [*_new_environment(base, settings), _pip(settings, "install", "--no-deps", *tools)]
    if engine:
        commands += _engine_commands(base, settings, lock)
    if apex:
        commands += _apex_commands(base, settings)
    return commands


def plan_packages(base: Base, settings: Settings, wheels: list[Path]) -> list[Command]:
    """The environment over the base: exactly what the lock says, then what was compiled, then torch where there is none."""
    lock = _lock(base, settings)
    commands = _new_environment(base, settings)
    # first, for source distributions among the others: with build isolation each would fetch the newest setuptools
    commands.append(_pip(settings, "install", "--no-deps", "--no-compile", *_pins(lock, ["pip", "setuptools", "wheel"])))
    commands.append(_pip(settings, "install", "--no-deps", "--no-compile", "--no-build-isolation", *_lines_without(lock, OWN_WHEELS)))
    if wheels:
        commands.append(_pip(settings, "install", "--no-deps", "--no-compile", "--no-index", *map(str, wheels)))
    if base.torch is None:
        index = ["--extra-index-url", settings.torch_index] if settings.torch_index else []
        commands.append(_pip(settings, "install", "--no-compile", *index, "--constraint", str(lock), f"torch=={settings.torch_version}"))
    return commands


def plan_project(settings: Settings) -> list[Command]:
    """Without an index: whatever is not there already, in a version that setup.py allows, is an error and not a download."""
    what = f"{settings.source}[{settings.extras}]" if settings.extras else str(settings.source)
    offline = ["--no-index", "--no-build-isolation", "--no-compile"]
    # hashes that are not looked at, in place of times: nothing is compiled again where a layer is unpacked with others
    compiled = [settings.python, "-c", COMPILE_ALL, str(settings.environment / "lib")]
    return [_pip(settings, "install", *offline, "--constraint", str(settings.held), what), Command(compiled)]


def plan_check(base: Base, settings: Settings) -> list[Command]:
    """base: what was recorded."""
    names = ["megatron.core", "minitron_megatron", *(["transformer_engine.pytorch", "apex.multi_tensor_apply"] if base.cuda else [])]
    program = f"import {', '.join(names)}; import torch; print(torch.__version__, torch.__file__)"
    if base.torch is not None:
        recorded = f"{(base.torch, base.torch_folder)!r}"
        program += f"; assert (torch.__version__, torch.__file__.rsplit('/', 1)[0]) == {recorded}, \"torch is not the base's\""
    return [Command([settings.python, "-c", program]), Command([str(settings.environment / "bin" / "minitron"), "doctor"])]


def _lock(base: Base, settings: Settings) -> Path:
    lock = settings.locks / f"{lock_name(base)}.txt"
    if not lock.is_file():
        raise BaseError(f"{lock} is missing; bash launch/lock.sh {lock_name(base)} makes it")
    return lock


def _new_environment(base: Base, settings: Settings) -> list[Command]:
    """A base with a pip of its own may lack ensurepip, as Debian's and Ubuntu's do; the environment sees that pip."""
    without_pip = ["--without-pip"] if base.has_pip else []
    return [Command([sys.executable, "-m", "venv", "--clear", "--system-site-packages", *without_pip, str(settings.environment)])]


def _engine_commands(base: Base, settings: Settings, lock: Path) -> list[Command]:
    """The core library is a wheel of all architectures; its torch extension is compiled against the base's torch."""
    core = f"transformer-engine-cu{(base.cuda or '').split('.')[0]}"
    ready = _pins(lock, ["transformer-engine", core])
    own = {"NVTE_FRAMEWORK": "pytorch", "NVTE_PYTORCH_FORCE_BUILD": "TRUE", "MAX_JOBS": str(settings.jobs)}  # forced, or setup.py downloads one
    target = ["wheel", "--no-deps", "--wheel-dir", str(settings.wheels)]
    return [
        _pip(settings, *target, *ready),
        Command(_pip(settings, *target, "--no-build-isolation", *_pins(lock, ["transformer-engine-torch"])).words, own),
    ]


def _apex_commands(base: Base, settings: Settings) -> list[Command]:
    folder = str(settings.wheels.parent / "apex-source")
    git = ["git", "-C", folder]
    own = {
        "APEX_CPP_EXT": "1",
        "APEX_CUDA_EXT": "1",
        "APEX_PARALLEL_BUILD": str(settings.jobs),
        "MAX_JOBS": str(settings.jobs),
        "TORCH_CUDA_ARCH_LIST": ";".join(settings.architectures),
    }
    if not re.fullmatch(r"[0-9a-f]{40}", settings.apex_commit):
        raise BaseError(f"APEX_COMMIT: '{settings.apex_commit}' is no full commit id; a branch or tag may move")
    fetched = [] if base.has_git else [Command(["apt-get", "update"]), Command(["apt-get", "install", "-y", "--no-install-recommends", "git"])]
    fetched += [
        Command(["git", "init", "--quiet", folder]),
        Command([*git, "fetch", "--quiet", "--depth", "1", settings.apex_repository, settings.apex_commit]),
        Command([*git, "checkout", "--quiet", settings.apex_commit]),
    ]
    built = _pip(settings, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(settings.wheels), folder)
    return [*fetched, Command(built.words, own)]


def _pip(settings: Settings, *words: str) -> Command:
    return Command([settings.python, "-m", "pip", *words])


def _pins(lock: Path, names: list[str]) -> list[str]:
    """The lock's lines of these packages; raises BaseError where one is missing."""
    lines = {_normal(line.split("==")[0]): line for line in _lines(lock)}
    missing = [name for name in names if name not in lines]
    if missing:
        raise BaseError(f"{lock} has no {', '.join(missing)}; bash launch/lock.sh {lock.stem} makes it anew")
    return [lines[name] for name in names]


def _lines_without(lock: Path, pattern: re.Pattern[str]) -> list[str]:
    return [line for line in _lines(lock) if not pattern.match(line)]


def _lines(lock: Path) -> list[str]:
    return [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def carry_out(commands: list[Command], *, dry_run: bool) -> int:
    """The exit code of the first command that fails, else 0."""
    for command in commands:
        print(f"+ {command}", flush=True)
        code = 0 if dry_run else subprocess.run(command.words, env={**os.environ, **command.environment}, check=False).returncode
        if code:
            return code
    return 0


def hold_torch(settings: Settings) -> None:
    """Writes the constraint that keeps later installations from replacing torch."""
    program = "import importlib.metadata; print(importlib.metadata.version('torch'))"
    version = subprocess.run([settings.python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    settings.held.write_text(f"torch=={version}\n")


def run_step(step: str, settings: Settings, *, dry_run: bool) -> int:
    if step == "wheels":
        if not dry_run:
            settings.wheels.mkdir(parents=True, exist_ok=True)  # the Dockerfile mounts it, empty or not
        return carry_out(plan_wheels(_supported_base(), settings), dry_run=dry_run)
    if step == "packages":
        base = _supported_base()
        code = carry_out(plan_packages(base, settings, sorted(settings.wheels.glob("*.whl"))), dry_run=dry_run)
        if code == 0 and not dry_run:
            settings.record.write_text(json.dumps(asdict(base), indent=1) + "\n")
            hold_torch(settings)
        return code
    if step == "project":
        return carry_out(plan_project(settings), dry_run=dry_run)
    if step == "check":
        recorded = json.loads(settings.record.read_text())
        return carry_out(plan_check(Base(**{**recorded, "python": tuple(recorded["python"])}), settings), dry_run=dry_run)
    raise BaseError(f"'{step}' is none of wheels, packages, project, check")


def _supported_base() -> Base:
    base = inspect_base()
    print(f"base: {json.dumps(asdict(base))}", flush=True)
    require_supported(base)
    return base


def main(arguments: list[str]) -> int:
    dry_run = "--dry-run" in arguments
    steps = [argument for argument in arguments if argument != "--dry-run"]
    try:
        for step in steps:
            code = run_step(step, read_settings(os.environ), dry_run=dry_run)
            if code:
                return code
    except BaseError as error:
        print(f"docker/install.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
