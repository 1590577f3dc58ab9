"""Measures groups of claims on a GPU and prints one table; tests/gpu/run_all.sh calls it.

    python -m gpu.table --work FOLDER --out FILE.json GROUP…

Exit code 1 where a claim does not hold. FOLDER keeps what was run: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .bench import in_processes
from .claims import GROUPS
from .ground import Ground
from .setting import Run
from .verdict import Verdict, judge, table

LOG_CHARACTERS = 20_000


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", choices=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    ground = Ground(chosen.work.resolve())
    claims = [claim for group in chosen.groups for claim in GROUPS[group](ground)]
    verdicts = judge(claims, in_processes(ground.folder))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.with_suffix(".log").write_text(printed(ground.folder, [run for claim in claims for run in claim.needs()]))
    chosen.out.write_text(json.dumps(report(chosen.groups, verdicts), indent=1))
    print(table(verdicts), flush=True)
    return 0 if all(verdict.holds for verdict in verdicts) else 1


def printed(folder: Path, runs: list[Run]) -> str:
    """The end of what each run said."""
    files = [folder / run.name / "output.txt" for run in dict.fromkeys(runs)]
    return "\n".join(f"=== {file.parent.name}\n{file.read_text()[-LOG_CHARACTERS:]}" for file in files if file.is_file())


def report(groups: list[str], verdicts: list[Verdict]) -> dict[str, Any]:
    """With where and when."""
    return {
        "groups": groups,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **machine(),
        "claims": [v.to_dict() for v in verdicts],
    }


def machine() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    names = ("torch", "transformer-engine", "megatron-core", "transformers", "numpy")
    return {"gpu": gpu, "cuda": torch.version.cuda, "versions": {name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "–"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
