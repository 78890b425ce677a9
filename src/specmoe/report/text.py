"""How numbers are written, the same in the terminal and in the report."""

from __future__ import annotations

from specmoe.report.select import has_width
from specmoe.results import Interval

__all__ = ["count", "duration", "margin", "microseconds", "percent", "percent_range", "points", "points_range"]

NOT_MEASURED = "–"


def percent(interval: Interval | None) -> str:
    """``88.1 ± 0.5``, in %; the half-width is left out where no interval could be drawn."""
    if interval is None:
        return NOT_MEASURED
    half = f" ± {50 * (interval.high - interval.low):.1f}" if has_width(interval) else ""
    return f"{100 * interval.value:.1f}{half}"


def percent_range(interval: Interval) -> str:
    """``88.1 % (87.6 to 88.6)``, for sentences."""
    limits = f" ({100 * interval.low:.1f} to {100 * interval.high:.1f})" if has_width(interval) else ""
    return f"{100 * interval.value:.1f} %{limits}"


def points(interval: Interval | None) -> str:
    """``+3.0 [+2.6, +3.4]``, a difference in percentage points."""
    if interval is None:
        return NOT_MEASURED
    limits = f" [{_signed(interval.low)}, {_signed(interval.high)}]" if has_width(interval) else ""
    return f"{_signed(interval.value)}{limits}"


def points_range(interval: Interval) -> str:
    """``3.0 points (2.6 to 3.4)``, for sentences."""
    if not has_width(interval):
        return f"{100 * interval.value:.1f} points"
    return f"{100 * interval.value:.1f} points ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def margin(interval: Interval | None) -> str:
    """``+3.0 ± 0.4``, a difference in percentage points, for narrow columns."""
    if interval is None:
        return NOT_MEASURED
    half = f" ± {50 * (interval.high - interval.low):.1f}" if has_width(interval) else ""
    return f"{_signed(interval.value)}{half}"


def _signed(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def count(number: int) -> str:
    """``38,112`` up to a hundred thousand, then ``1.2 M``."""
    if number < 100_000:
        return f"{number:,}"
    return f"{number / 1e3:.0f} K" if number < 999_500 else f"{number / 1e6:.2f} M"


def microseconds(value: float | None) -> str:
    """``41 µs`` or ``1.2 ms``."""
    if value is None:
        return NOT_MEASURED
    if value < 1000:
        return f"{value:.0f} µs" if value >= 10 else f"{value:.1f} µs"
    return f"{value / 1000:.1f} ms"


def duration(seconds: float | None) -> str:
    """``3.2 s``, ``41 s`` or ``5 min 10 s``."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
