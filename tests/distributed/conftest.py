"""Fixtures of the distributed tests: the pool, and a record of what they measured, which --numerics writes into docs/numerics.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .house import build_house, publish_stage, recipe_for
from .numerics import Measured, Numerics
from .pool import Pool

NUMERICS = Numerics()
Record = Callable[[str, str, float], Measured]
Identical = Callable[[str, str, bool], bool]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--numerics", metavar="FILE", help="write the table of measured differences into this file, docs/numerics.md")


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    workers = Pool(tmp_path_factory.mktemp("pool"))
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def measured() -> Record:
    """measured(claim, layout, difference) → the difference, to be compared with its limit: `assert measured(…) <= 1e-6`."""
    return NUMERICS.measured


@pytest.fixture(scope="session")
def identical() -> Identical:
    """identical(claim, layout, same bits?) → whether they are: `assert identical(…)`."""
    return NUMERICS.identical


@pytest.fixture(scope="session")
def broken() -> Record:
    """broken(what was broken, layout, difference) → the difference, which must be beyond the limit: `assert broken(…) > 1e-6`."""
    return NUMERICS.broken


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in NUMERICS.lines():
        terminalreporter.write_line(line)
    file = terminalreporter.config.getoption("numerics", default=None)
    if file:
        NUMERICS.write_into(Path(file))


@pytest.fixture(scope="session")
def house(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs` with the artifacts import, data, importance and prune of a tiny model."""
    runs = tmp_path_factory.mktemp("house")
    build_house(runs)
    for stage in ("importance", "prune"):
        pool.run(publish_stage, stage, recipe_for(runs), processes=1)
    return runs
