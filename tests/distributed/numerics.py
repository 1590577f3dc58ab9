"""What the tests measured: claim by claim the worst difference, its layout and the limit that it was compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- written by the tests: begin -->", "<!-- end -->"


class Measured(float):
    """A difference that remembers the limit that a test compares it with."""

    limit: float = float("nan")

    def __le__(self, other: Any) -> bool:
        self.limit = float(other)
        return float(self) <= self.limit

    def __gt__(self, other: Any) -> bool:
        self.limit = float(other)
        return float(self) > self.limit


class Numerics:
    """Of one session of tests."""

    def __init__(self) -> None:
        self._measured: dict[tuple[str, str], Measured] = {}
        self._broken: dict[tuple[str, str], Measured] = {}
        self._identical: dict[tuple[str, str], bool] = {}

    def measured(self, claim: str, layout: str, difference: float) -> Measured:
        found = Measured(difference)
        self._measured[claim, layout] = max(self._measured.get((claim, layout), found), found, key=float)
        return found

    def broken(self, what: str, layout: str, difference: float) -> Measured:
        self._broken[what, layout] = Measured(difference)
        return self._broken[what, layout]

    def identical(self, claim: str, layout: str, same: bool) -> bool:
        self._identical[claim, layout] = same and self._identical.get((claim, layout), True)
        return same

    def lines(self) -> Iterator[str]:
        if self._measured:
            yield "worst differences that were measured"
        for (claim, layout), difference in sorted(self._measured.items()):
            yield f"{claim:40} {layout:20} {difference:.1e}"

    def write_into(self, file: Path) -> None:
        """Puts the tables between the two marks of a file; the text around them stays."""
        before, rest = file.read_text().split(BEGIN)
        _, after = rest.split(END)
        file.write_text(f"{before}{BEGIN}\n\n{self.tables()}\n{END}{after}")

    def tables(self) -> str:
        bits = [f"| {claim} | {', '.join(self._layouts(self._identical, claim))} |" for claim in _claims(self._identical)]
        close = [self._row(claim) for claim in _claims(self._measured)]
        broken = [f"| {what} | {layout} | {value:.1e} | {value.limit:.0e} |" for (what, layout), value in sorted(self._broken.items())]
        return "\n".join(
            [
                *("### Identical to the bit", "", "| what | layouts |", "|---|---|", *bits, ""),
                *("### Within a tolerance", "", "| what | worst | in layout | limit | layouts measured |", "|---|--:|---|--:|---|", *close, ""),
                *("### Broken on purpose", "", "| what was broken | layout | difference seen | limit |", "|---|---|--:|--:|", *broken, ""),
            ]
        )

    def _row(self, claim: str) -> str:
        of_claim = {layout: value for (name, layout), value in self._measured.items() if name == claim}
        layout, worst = max(of_claim.items(), key=lambda item: float(item[1]))
        return f"| {claim} | {worst:.1e} | {layout} | {worst.limit:.0e} | {', '.join(sorted(of_claim))} |"

    def _layouts(self, of: dict[tuple[str, str], bool], claim: str) -> list[str]:
        """A claim that failed says so."""
        return sorted(layout if same else f"**not {layout}**" for (name, layout), same in of.items() if name == claim)


def _claims(of: dict[tuple[str, str], Any]) -> list[str]:
    return sorted({claim for claim, _ in of})
