"""A claim, what was measured of it, and the table of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .bench import Bench, RunFailed
from .setting import Outcome, Run

Outcomes = list[Outcome]


@dataclass(frozen=True)
class Claim:
    """That a figure made of some runs lies between two bounds."""

    group: str
    name: str
    runs: tuple[Run, ...]
    measure: Callable[[Outcomes], float]
    """The runs' outcomes, in order → the figure."""
    at_most: float
    reason: str
    """Why this bound."""
    house: Run | None = None
    """What the runs live in."""
    at_least: float = 0.0
    """Above 0 where nothing at all means that what is to be measured was off."""

    def needs(self) -> tuple[Run, ...]:
        return (*([self.house] if self.house else []), *self.runs)


@dataclass(frozen=True)
class Verdict:
    """What became of a claim; measured is None where a run failed, and then `why` is its last word."""

    claim: Claim
    measured: float | None
    why: str = ""

    @property
    def holds(self) -> bool:
        """NaN never does."""
        return self.measured is not None and math.isfinite(self.measured) and self.claim.at_least <= self.measured <= self.claim.at_most

    def to_dict(self) -> dict[str, object]:
        claim = self.claim
        return {
            "group": claim.group,
            "claim": claim.name,
            "measured": self.measured,
            "at_least": claim.at_least,
            "at_most": claim.at_most,
            "holds": self.holds,
            "reason": claim.reason,
            "failed": self.why,
        }


def judge(claims: Iterable[Claim], bench: Bench) -> list[Verdict]:
    """Carries out what the claims need, each run once, and judges them all: a run that fails fails its own claims alone."""
    every = list(claims)
    found = bench.outcomes(run for claim in every for run in claim.needs())
    return [_judged(claim, found) for claim in every]


def _judged(claim: Claim, found: Mapping[Run, Outcome | RunFailed]) -> Verdict:
    failure = next((found[run] for run in claim.needs() if isinstance(found[run], RunFailed)), None)
    if failure:
        return Verdict(claim, None, str(failure))
    try:
        return Verdict(claim, claim.measure([found[run] for run in claim.runs]))
    except Exception as error:  # a file that is cut off or not there, a division by 0: one claim's failure, not the table's
        return Verdict(claim, None, f"{type(error).__name__}: {error}")


def table(verdicts: Iterable[Verdict]) -> str:
    """One line a claim; below them, once, why those failed that did."""
    every = list(verdicts)
    rows = [f"{'verdict':<14} {'measured':>9} {'at least':>9} {'at most':>9}  claim"]
    for verdict in every:
        measured = "failed" if verdict.measured is None else f"{verdict.measured:.3g}"
        shown = "holds" if verdict.holds else "DOES NOT HOLD"
        least = f"{verdict.claim.at_least:.3g}" if verdict.claim.at_least else "–"
        rows.append(f"{shown:<14} {measured:>9} {least:>9} {verdict.claim.at_most:>9.3g}  {verdict.claim.group}: {verdict.claim.name}")
    held = sum(verdict.holds for verdict in every)
    return "\n".join([*rows, *dict.fromkeys(verdict.why for verdict in every if verdict.why), f"{held} of {len(every)} claims hold"])
