"""Groups that the package makes give up waiting when the recipe says: torch's own 30 minutes would hang a job."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[3] / "minitron_megatron"


def test_every_group_is_made_with_a_timeout() -> None:
    calls = [
        (path, node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("new_group", "create_pg")
    ]
    assert len(calls) >= 4
    assert [f"{path.name}:{node.lineno}" for path, node in calls if "timeout" not in {keyword.arg for keyword in node.keywords}] == []
