"""Builds the image of docker/Dockerfile over a Debian base, as docker/README.md tells it, with what this machine tells pip; runs commands in it.

All that buildah keeps lies in a storage of the test's own, which is removed in the end: the machine's images are neither used nor touched.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pytest import MonkeyPatch

ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/minitron-base:test"
IMAGE = "localhost/minitron-megatron:test"
ISOLATION = ("--isolation", "chroot")
PATIENCE_SECONDS = 900
NEEDED_BYTES = 12_000_000_000
"""What vfs takes at its highest, with the base, the image and the containers each a copy; overlay takes half of it."""
PLACES = ("find-links", "index-url", "extra-index-url")
SETTINGS = (*PLACES, "proxy", "trusted-host", "timeout", "retries")
"""Of pip: what says where packages come from, and how."""


def why_not(folder: Path) -> str | None:
    """Why no image can be built here; None where one can. What is tried is the machine, never the Dockerfile: that one's failures are failures."""
    if os.geteuid() != 0:
        return "buildah builds with chroot isolation as root only"
    missing = [program for program in ("buildah", "mmdebstrap") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (apt-get install buildah mmdebstrap)"
    if shutil.disk_usage(folder).free < NEEDED_BYTES:
        return f"less than {NEEDED_BYTES / 1e9:.0f} GB free in {folder}"
    if not pip_finds("wheel"):
        return "no package index can be reached"
    return None


@contextmanager
def own_storage(folder: Path) -> Iterator[str | None]:
    """buildah's storage in this folder, for every command inside; gives why this machine's kernel lets buildah run nothing, None where it works.

    overlay shares what layers have in common; a file system without it (a container's own, as a rule) is served by vfs, which copies.
    """
    configuration = folder / "storage.conf"
    reason = None
    with MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_STORAGE_CONF", str(configuration))
        patch.delenv("STORAGE_DRIVER", raising=False)
        for driver in ("overlay", "vfs"):
            lines = ["[storage]", f'driver = "{driver}"', f'graphroot = "{folder / driver}"', f'runroot = "{folder / "run"}"']
            configuration.write_text("\n".join(lines) + "\n")
            reason = why_nothing_runs()
            if reason is None:
                break
        try:
            yield reason
        finally:
            unmount_below(folder)
            shutil.rmtree(folder)


def why_nothing_runs() -> str | None:
    """Runs the machine's own `true` in an empty container, as a RUN of the Dockerfile would be, and makes an image of it."""
    made = attempt("buildah", "from", "scratch")
    container = made.stdout.strip()
    volumes = [f"--volume={place}:{place}:ro" for place in ("/bin", "/lib", "/lib64", "/usr") if Path(place).exists()]
    steps = [
        ["buildah", "run", *ISOLATION, *volumes, container, "--", "/bin/true"],
        ["buildah", "commit", "--quiet", "--format", "docker", "--rm", container, "localhost/nothing:test"],
    ]
    tried = [made, *(attempt(*step) for step in steps if made.returncode == 0)]
    return next((f"{' '.join(each.args[:2])}: {each.stderr.strip()[-300:]}" for each in tried if each.returncode), None)


def unmount_below(folder: Path) -> None:
    """buildah leaves its storage mounted upon itself."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in reversed([place for place in mounted if Path(place).is_relative_to(folder)]):
        subprocess.run(["umount", "--lazy", place], check=True)


def pip_finds(requirement: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", requirement]
    return attempt(*command).returncode == 0


def pip_settings() -> dict[str, str]:
    """What this machine's pip is told by its files and environment; the more particular ones last."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    pairs = [line.split("=", 1) for line in said.splitlines() if "=" in line]
    return {name.rsplit(".", 1)[1]: ast.literal_eval(value) for name, value in pairs}


def local_folders(settings: dict[str, str]) -> set[Path]:
    """Folders that pip looks into; pages of an index on disk name files beside their own folder."""
    places = [place.removeprefix("file://") for name in PLACES for place in settings.get(name, "").split()]
    folders = [Path(place) for place in places if place.startswith("/")]
    return {folder.parent if folder.name == "simple" else folder for folder in folders if folder.exists()}


def make_base() -> None:
    """By docker/cpu_base.sh; skips the test where it fails because Debian's packages cannot be had at all."""
    try:
        output("bash", str(ROOT / "docker" / "cpu_base.sh"), BASE)
    except AssertionError:
        reached = subprocess.run(
            ["mmdebstrap", "--simulate", "--variant=extract", "bookworm", "/dev/null"], capture_output=True, text=True, check=False
        )
        if reached.returncode:
            pytest.skip(f"no Debian mirror can be reached: {reached.stderr.strip()[-300:]}")
        raise


def build(folder: Path, *, note: str) -> None:
    """The image; folder: for the build's secrets. note: a line of the pip configuration, as a password would be one."""
    settings = pip_settings()
    lines = ["[global]", f"# {note}", *(f"{name} = {' '.join(settings[name].split())}" for name in SETTINGS if name in settings)]
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    secrets = [f"--secret=id=pip.conf,src={folder / 'pip.conf'}"]
    if "cert" in settings:
        secrets.append(f"--secret=id=ca.crt,src={settings['cert']}")
    volumes = [f"--volume={place}:{place}:ro" for place in sorted(local_folders(settings))]
    torch = re.findall(r"^ARG TORCH_VERSION=(.*)$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)[0]
    index = ["--build-arg=TORCH_INDEX_URL="] if pip_finds(f"torch=={torch}") else []  # else the Dockerfile's
    command = ["buildah", "build", "--format", "docker", *ISOLATION, "--file", "docker/Dockerfile", "--tag", IMAGE]
    output(*command, f"--build-arg=BASE={BASE}", "--build-arg=REVISION=0123abc", *index, *secrets, *volumes, ".")


def attempt(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)


def output(*command: str) -> str:
    """What it prints; raises with the end of all it said where it fails."""
    run = attempt(*command)
    if run.returncode:
        raise AssertionError(f"{' '.join(command[:3])} … ended with {run.returncode}:\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}")
    return run.stdout.strip()


@dataclass(frozen=True)
class Container:
    """A container of the image, in which commands are run one after another."""

    name: str

    def try_(self, *command: str, user: str = "", volumes: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
        options = [*(f"--volume={volume}" for volume in volumes), *(f"--env={name}={value}" for name, value in variables.items())]
        options += [f"--user={user}"] if user else []
        return attempt("buildah", "run", *ISOLATION, *options, self.name, "--", *command)

    def run(self, *command: str, user: str = "", volumes: tuple[str, ...] = (), **variables: str) -> str:
        done = self.try_(*command, user=user, volumes=volumes, **variables)
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def described(self) -> dict[str, Any]:
        """The image's own configuration, in Docker's format."""
        return json.loads(output("buildah", "inspect", "--type", "image", IMAGE))["Docker"]
