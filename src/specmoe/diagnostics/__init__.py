"""Is a trace worth anything? Facts and findings, before anyone trains on it."""

from specmoe.diagnostics.result import Finding, Validation
from specmoe.diagnostics.validate import validate_trace

__all__ = ["Finding", "Validation", "validate_trace"]
