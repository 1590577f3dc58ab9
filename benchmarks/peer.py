"""The peer's virtual environment: nvidia-modelopt with everything that we run on, so that both work on the same tensors in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTILLATION = "0.47.0"
PRUNING = "0.43.0"
"""The newest whose pruning runs on a CPU: from 0.44 on it imports Transformer Engine."""


def in_peer_environment(modelopt: str = DISTILLATION) -> None:
    """Goes on in the environment of this version of the peer: made the first time (minutes), then this script starts again in it."""
    python = ROOT / f".venv-modelopt-{modelopt}" / "bin" / "python"
    if Path(sys.executable) != python:
        if not (python.parent / ".ready").is_file():
            _make(python, modelopt)
        os.execve(python, [str(python), *sys.argv], {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})


def _make(python: Path, modelopt: str) -> None:
    """The project's locked versions, then the peer's package beside them."""
    folder, log = python.parent.parent, python.parent.parent / "install.log"
    print(f"installing nvidia-modelopt {modelopt} into {folder.name} (minutes, the first time)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    lock = ROOT / "requirements" / f"py{sys.version_info.major}{sys.version_info.minor}.txt"
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    wanted = [f"torch=={version('torch')}"], ["-c", str(lock), "-e", f"{ROOT}[dev]"], ["-c", str(lock), f"nvidia-modelopt=={modelopt}"]
    with log.open("w") as written:
        for arguments in wanted:
            subprocess.run([*pip, *arguments], check=True, stdout=written, stderr=written, cwd=ROOT)
    (python.parent / ".ready").touch()
