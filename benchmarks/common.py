"""What every benchmark needs: the demo's recipe in a folder of its own, the command line, and a result file that says how it was made."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

RECIPE = "configs/smollm2_135m_to_97m.yaml"
RESULTS = Path(__file__).with_name("results")


def minitron(verb: str, *overrides: str, environment: dict[str, str] | None = None) -> None:
    """Runs a verb on the demo's recipe as a user would; a failure ends the benchmark."""
    command = [sys.executable, "-m", "minitron_megatron.cli", verb, RECIPE, *overrides]
    print("$ minitron", *command[3:], flush=True)
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})})


def result_of(runs: Path, stage: str, name: str = "smollm2_135m_to_97m") -> dict[str, Any]:
    return json.loads((runs / name / stage / "result.json").read_text())


def write_result(name: str, title: str, text: str, figures: dict[str, Any]) -> None:
    """benchmarks/results/NAME.md: the table, the command, the machine, the date; the same figures as the last line, in JSON."""
    RESULTS.mkdir(exist_ok=True)
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    lines = [
        f"# {title}",
        "",
        text.strip(),
        "",
        f"Command: `python benchmarks/{command}`. Date: {date.today().isoformat()}. Machine: {machine()}.",
        "",
        "```json",
        json.dumps(figures),
        "```",
    ]
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:-4]))
    print(json.dumps(figures))


def machine() -> str:
    """CPU, cores, memory and the versions that matter."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers"))
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, no GPU; Python {platform.python_version()}, {versions}"
