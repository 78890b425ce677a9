"""What may be wrong with a trace: one small function per finding, walked in order."""

from __future__ import annotations

from collections.abc import Callable

from specmoe.diagnostics.evidence import Evidence
from specmoe.diagnostics.findings import documents, gates, hidden, routing, shape
from specmoe.diagnostics.result import Finding, Severity

__all__ = ["CHECKS", "findings_of"]

Check = Callable[[Evidence], Finding | None]

CHECKS: tuple[Check, ...] = (*documents.CHECKS, *shape.CHECKS, *routing.CHECKS, *gates.CHECKS, *hidden.CHECKS)

_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "note": 2}


def findings_of(evidence: Evidence) -> tuple[Finding, ...]:
    """All findings, worst first."""
    if evidence.scan.tokens == 0:
        return (Finding(code="empty", severity="error", message="the trace holds no token; capture or import again"),)
    found = [finding for check in CHECKS if (finding := check(evidence)) is not None]
    return tuple(sorted(found, key=lambda finding: _ORDER[finding.severity]))
