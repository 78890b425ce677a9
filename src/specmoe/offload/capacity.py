"""How much of a model a cache holds: shares, bytes and numbers of experts as people write them."""

from __future__ import annotations

import re

from specmoe.errors import SpecmoeError
from specmoe.topology import Topology

__all__ = ["parse_capacity"]

_UNITS = {"b": 1, **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_FORM = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([%a-zA-Z]*)\s*")


def parse_capacity(text: str, topology: Topology, expert_bytes: int) -> int:
    """Experts that fit: of ``25%`` (of all experts), ``8GiB``, ``500MB`` or ``32`` (experts), at most all of them.

    Args:
        expert_bytes: size of one expert as it is stored.

    Raises:
        SpecmoeError: it is none of these, or not even one expert fits.
    """
    everything = topology.layers * topology.experts
    form = "a share like 25%, a size like 8GiB or 500MB, or a number of experts like 32"
    match = _FORM.fullmatch(text)
    if match is None:
        raise SpecmoeError(f"capacity {text!r} cannot be read; give {form}")
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        if number > 100:
            raise SpecmoeError(f"capacity {text!r} is more than all experts; give at most 100%")
        # 30 % of 10 are 3, whatever the binary fraction says.
        held = int(everything * number / 100 + 1e-9)
    elif unit in _UNITS:
        held = int(number * _UNITS[unit] // expert_bytes)
    elif unit == "" and number.is_integer():
        held = int(number)
    else:
        raise SpecmoeError(f"capacity {text!r} cannot be read; give {form}")
    if held < 1:
        raise SpecmoeError(f"capacity {text!r} holds not even one expert of {expert_bytes:,} bytes; give more")
    return min(held, everything)
