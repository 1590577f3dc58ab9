"""Fixtures of the distributed tests: the pool, and a record of the worst differences that they measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .house import build_house, publish_stage, recipe_for
from .pool import Pool

MEASURED: dict[tuple[str, str], float] = {}
Record = Callable[[str, str, float], float]


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    workers = Pool(tmp_path_factory.mktemp("pool"))
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def measured() -> Record:
    """measured(claim, layout, difference) → the difference; the largest of each is printed at the end."""

    def record(claim: str, layout: str, difference: float) -> float:
        MEASURED[claim, layout] = max(difference, MEASURED.get((claim, layout), 0.0))
        return difference

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MEASURED:
        terminalreporter.section("worst differences that were measured")
    for (claim, layout), difference in sorted(MEASURED.items()):
        terminalreporter.write_line(f"{claim:40} {layout:20} {difference:.1e}")


@pytest.fixture(scope="session")
def house(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs` with the artifacts import, data, importance and prune of a tiny model."""
    runs = tmp_path_factory.mktemp("house")
    build_house(runs)
    for stage in ("importance", "prune"):
        pool.run(publish_stage, stage, recipe_for(runs), processes=1)
    return runs
