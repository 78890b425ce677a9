"""What all pages are made of: the template engine, the style, the scripts, and JSON that can stand in a script."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from specmoe.report.text import duration
from specmoe.report.theme import DARK, LIGHT, vega_config
from specmoe.results import Made, TraceFacts

__all__ = ["Facts", "Figure", "as_script", "environment", "is_page", "made_facts", "page_parts", "trace_facts"]

_HEAD_BYTES = 4096
# A heading, with names and values.
Facts = tuple[str, list[tuple[str, str]]]


class Figure(NamedTuple):
    """A chart of the page. id: of its element. label: what it shows, for those who do not see it."""

    id: str
    label: str
    title: str = ""
    note: str = ""


def trace_facts(trace: TraceFacts) -> Facts:
    """Of which model and trace a page speaks."""
    topology = trace.topology
    return (
        "Model and trace",
        [
            ("model", f"{topology.model_id} {topology.revision}".strip()),
            ("shape", f"{topology.layers} MoE layers, {topology.experts_text} experts, K={topology.top_k}"),
            ("trace", f"{trace.name}: {trace.tokens:,} tokens, {trace.documents:,} documents, {trace.domains} domains"),
            ("fingerprint", trace.fingerprint),
        ],
    )


def made_facts(made: Made) -> Facts:
    """By what a page's figures were made."""
    return (
        "Made by",
        [
            ("date", made.date),
            ("commit", made.commit),
            ("command", made.command),
            ("took", duration(made.seconds)),
            *made.versions.items(),
            *made.hardware.items(),
        ],
    )


def is_page(path: Path) -> bool:
    """Whether a file is a page of this package; never an error."""
    try:
        with path.open("rb") as stream:
            return b'<meta name="generator" content="specmoe">' in stream.read(_HEAD_BYTES)
    except OSError:
        return False


def environment() -> Environment:
    """Templates of this folder; everything that is filled in is escaped."""
    made = Environment(
        loader=PackageLoader("specmoe.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["breakable"] = _breakable
    return made


def page_parts(charts: Mapping[str, Any]) -> dict[str, Markup]:
    """Style, scripts and charts (by the id of their element), as a page's template names them.

    Autoescaping is off for these only: our own files, and JSON in which no tag can begin or end.
    """
    return {
        "style": Markup(_asset("style.css")),
        "script": Markup(_asset("page.js")),
        "library": Markup(_library()),
        "charts_json": as_script(charts),
        "themes_json": as_script({"light": vega_config(LIGHT), "dark": vega_config(DARK)}),
    }


def as_script(value: Any) -> Markup:
    """A value as JSON, for a script element."""
    return Markup(_json(value))


def _breakable(name: str) -> Markup:
    """A name that may break before its capitals."""
    return Markup("<wbr>").join(re.split(r"(?<=[a-z])(?=[A-Z])", name))


def _json(value: Any) -> str:
    """JSON that can stand in a script element whatever text it holds."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return resources.files("specmoe.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; building it takes seconds, so once a process."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
