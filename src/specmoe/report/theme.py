"""Colours and type of the charts, light and dark.

Charts hold no colours of their own: they name roles (a category range, the styles ``reference``, ``quiet`` …)
that one of the two Vega-Lite configurations below fills, so the page can follow the reader's preference.
The category colours follow Okabe and Ito (2008), which people with any common colour vision can tell apart;
shapes say the same once more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from specmoe.report.select import CATEGORIES

__all__ = ["CATEGORY_SHAPES", "DARK", "LIGHT", "Palette", "vega_config"]

# Vega symbol names, in the order of ``CATEGORIES``.
CATEGORY_SHAPES = dict(zip(CATEGORIES, ("circle", "square", "diamond", "triangle-up", "cross"), strict=True))
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


class Palette(NamedTuple):
    """Colours of one theme. categories: in the order of ``CATEGORIES``. ramp: from little to much."""

    ink: str
    muted: str
    grid: str
    paper: str
    categories: tuple[str, ...]
    ahead: str
    behind: str
    ramp: tuple[str, ...]
    on_low: str
    on_high: str


LIGHT = Palette(
    ink="#1c2430",
    muted="#55606f",
    grid="#e3e7ec",
    paper="#ffffff",
    categories=("#0067a8", "#c24a00", "#00805c", "#a8447f", "#6b7480"),
    ahead="#0067a8",
    behind="#c24a00",
    ramp=("#f1f5fa", "#c9dcee", "#8fb9db", "#4a8dc0", "#1b629b", "#0b3f6d"),
    on_low="#1c2430",
    on_high="#ffffff",
)
DARK = Palette(
    ink="#e6eaf0",
    muted="#a3adba",
    grid="#2b333e",
    paper="#171c23",
    categories=("#5bb3ec", "#ff9a4d", "#3fc79a", "#e391c0", "#9aa5b3"),
    ahead="#5bb3ec",
    behind="#ff9a4d",
    ramp=("#1d2733", "#1d3a56", "#235580", "#2f74a8", "#6aaedd", "#cfe6f7"),
    on_low="#e6eaf0",
    on_high="#10151b",
)


def vega_config(palette: Palette) -> dict[str, Any]:
    """The Vega-Lite configuration of a theme; axis style ``names`` is for long predictor names."""
    label = {"labelColor": palette.ink, "titleColor": palette.muted}
    return {
        "background": "transparent",
        "font": _FONT,
        "view": {"stroke": None},
        "padding": 2,
        "axis": {
            **label,
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "gridColor": palette.grid,
            "domainColor": palette.grid,
            "tickColor": palette.grid,
            "labelLimit": 240,
        },
        "legend": {**label, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "labelLimit": 260},
        "title": {"color": palette.ink, "fontSize": 12, "anchor": "start"},
        "range": {
            "category": list(palette.categories),
            "heatmap": list(palette.ramp),
            "ramp": list(palette.ramp),
            "ordinal": list(palette.ramp),
            # Of a paired difference: ahead, open, behind.
            "diverging": [palette.ahead, palette.muted, palette.behind],
        },
        "text": {"font": _FONT},
        # ``color`` and not ``fill`` or ``stroke``: only that outranks Vega-Lite's own default colour of a mark.
        "style": {
            "reference": {"color": palette.muted, "strokeDash": [4, 3], "strokeWidth": 1.2},
            "reference-text": {"color": palette.muted, "fontSize": 11},
            "stem": {"color": palette.grid, "strokeWidth": 1},
            "label": {"color": palette.ink, "fontSize": 11},
            "quiet": {"color": palette.muted, "strokeWidth": 1.2, "opacity": 0.7},
            "on-low": {"color": palette.on_low, "fontSize": 10},
            "on-high": {"color": palette.on_high, "fontSize": 10},
            "names": {"minExtent": 178, "maxExtent": 178, "labelLimit": 174, "domain": False, "ticks": False},
        },
    }
