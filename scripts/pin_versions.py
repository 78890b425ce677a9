"""Write constraints/cpu.txt: every package that ``make setup`` installs, in the version that is installed now.

Usage: python scripts/pin_versions.py (in the environment that the tests have just passed in)
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PINS = Path(__file__).resolve().parents[1] / "constraints" / "cpu.txt"
# What builds the package: pip would fetch it unpinned for a build of its own.
BUILD = ("hatchling", "editables")
_HEAD = """\
# Every package that `make setup` installs, as tested. Written by scripts/pin_versions.py; not by hand.
"""


def main() -> None:
    """Write the file."""
    versions = {name: Version(importlib.metadata.version(name)).public for name in needed("specmoe[dev]", *BUILD)}
    lines = [f"{name}=={version}\n" for name, version in sorted(versions.items())]
    PINS.write_text(_HEAD + "".join(lines), encoding="utf-8")


def needed(*requirements: str) -> set[str]:
    """Names of all packages that these need here, directly or through others, specmoe itself left out."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in importlib.metadata.requires(name) or ()]
    return found - {"specmoe"}


def pinned() -> dict[str, str]:
    """Names and versions in the file."""
    lines = re.sub(r"#.*", "", PINS.read_text(encoding="utf-8")).split()
    return dict(line.split("==") for line in lines)


if __name__ == "__main__":
    main()
