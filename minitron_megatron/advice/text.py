"""Findings as a person reads them."""

from __future__ import annotations

from minitron_megatron.advice.rules import RULES, Finding


def told(findings: list[Finding], step: str = "") -> str:
    """One paragraph a finding: what, why with its source, and the mend."""
    where = f"step {step}: " if step else ""
    if not findings:
        return f"{where}nothing against the {len(RULES)} findings that it was held against"
    return "\n\n".join(
        f"{where}{finding.severity}: {finding.what}\n  why:  {finding.why} ({finding.source})\n  mend: {finding.mend}" for finding in findings
    )
