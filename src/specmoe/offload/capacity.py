"""How much of a model a cache holds: shares, bytes and numbers of experts as people write them."""

from __future__ import annotations

import re

from specmoe.errors import SpecmoeError
from specmoe.topology import Topology

__all__ = ["parse_capacity"]

_UNITS = {"b": 1, **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_FORM = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([%a-zA-Z]*)\s*")
_SAID = "a share like 25% or 0.25, a size like 8GiB or 500MB, or a number of experts like 32"


def parse_capacity(text: str, topology: Topology, expert_bytes: int | None) -> int:
    """Experts that fit: at most all of them.

    Args:
        text: ``25%`` or ``0.25`` (of all experts of all layers), ``8GiB``, ``500MB``, ``32`` or ``32 experts``. Units
            with an i are powers of 1024, those without powers of 1000.
        topology: of the model. expert_bytes: size of one expert as it is stored; None where it is not known.

    Raises:
        SpecmoeError: it is none of these, not even one expert fits, or a size is given and that of an expert unknown.
    """
    everything = topology.layers * topology.experts
    match = _FORM.fullmatch(text)
    if match is None:
        raise SpecmoeError(f"capacity {text!r} cannot be read; give {_SAID}")
    number, unit = float(match[1]), match[2].lower()
    if unit == "" and 0 < number < 1:
        number, unit = 100 * number, "%"
    if unit == "%":
        if number > 100:
            raise SpecmoeError(f"capacity {text!r} is more than all experts; give at most 100%")
        # 30 % of 10 are 3, whatever the binary fraction says.
        held = int(everything * number / 100 + 1e-9)
    elif unit in _UNITS:
        if expert_bytes is None:
            raise SpecmoeError(
                f"capacity {text!r} is a size, and the trace does not say how large an expert of {topology.model_id} "
                "is; give --expert-bytes, or the capacity as a share like 25%"
            )
        held = int(number * _UNITS[unit] // expert_bytes)
    elif unit in {"", "expert", "experts"} and number.is_integer():
        held = int(number)
    else:
        raise SpecmoeError(f"capacity {text!r} cannot be read; give {_SAID}")
    if held < 1:
        size = "" if expert_bytes is None else f" of {expert_bytes:,} bytes"
        raise SpecmoeError(f"capacity {text!r} holds not even one expert{size}; give more")
    return min(held, everything)
