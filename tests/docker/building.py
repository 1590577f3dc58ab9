"""Builds the image of docker/Dockerfile over a Debian base, as docker/README.md tells it, with what this machine tells pip; runs commands in it."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "localhost/minitron-megatron:test"
ISOLATION = ("--isolation", "chroot")
PATIENCE_SECONDS = 900
PLACES = ("find-links", "index-url", "extra-index-url")
SETTINGS = (*PLACES, "proxy", "trusted-host", "timeout", "retries")
"""Of pip: what says where packages come from, and how."""


def why_not() -> str | None:
    """Why no image can be built here; None where one can."""
    if os.geteuid() != 0:
        return "buildah builds with chroot isolation as root only"
    missing = [program for program in ("buildah", "mmdebstrap") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (apt-get install buildah mmdebstrap)"
    if not pip_finds("wheel"):
        return "no package index can be reached"
    return None


def pip_finds(requirement: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", requirement]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


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


def make_base() -> str:
    """The name of the base, made where it is not there from an earlier run; its script's text is a part of the name."""
    script = ROOT / "docker" / "cpu_base.sh"
    name = f"localhost/minitron-base:{hashlib.sha256(script.read_bytes()).hexdigest()[:12]}"
    if not output("buildah", "images", "--quiet", "--filter", f"reference={name}"):
        output("bash", str(script), name)
    return name


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
    output(*command, f"--build-arg=BASE={make_base()}", "--build-arg=REVISION=0123abc", *index, *secrets, *volumes, ".")


def output(*command: str) -> str:
    """What it prints; raises with the end of all it said where it fails."""
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
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
        whole = ["buildah", "run", *ISOLATION, *options, self.name, "--", *command]
        return subprocess.run(whole, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)

    def run(self, *command: str, user: str = "", volumes: tuple[str, ...] = (), **variables: str) -> str:
        done = self.try_(*command, user=user, volumes=volumes, **variables)
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def described(self) -> dict[str, Any]:
        """The image's own configuration, in Docker's format."""
        return json.loads(output("buildah", "inspect", "--type", "image", IMAGE))["Docker"]
