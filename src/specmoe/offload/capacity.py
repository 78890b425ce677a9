"""How much of a model a cache holds: shares, bytes and numbers of experts as people write them.

Where all experts are of one size a capacity counts experts. Where sizes differ by layer it counts bytes: how many
experts fit then depends on which. Both are *units*: an expert takes one, or as many as it has bytes.
"""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import NDArray

from specmoe.errors import SpecmoeError
from specmoe.topology import Topology

__all__ = [
    "ExpertBytes",
    "all_units",
    "bytes_L",
    "held_at_share",
    "parse_capacity",
    "split_by_layer",
    "unit_bytes",
    "units_L",
]

# Of every expert; or of an expert of each layer, where they differ.
ExpertBytes = int | tuple[int, ...]

_UNITS = {"b": 1, **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_FORM = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([%a-zA-Z]*)\s*")
_SAID = "a share like 25% or 0.25, a size like 8GiB or 500MB, or a number of experts like 32"


def bytes_L(topology: Topology, expert_bytes: ExpertBytes) -> NDArray[np.int64]:
    """Size of an expert of each layer: int64 [L].

    Raises:
        SpecmoeError: there is not one size for each layer.
    """
    if isinstance(expert_bytes, int):
        return np.full(topology.layers, expert_bytes, dtype=np.int64)
    if len(expert_bytes) != topology.layers:
        raise SpecmoeError(f"{len(expert_bytes)} sizes of experts do not go with {topology.layers} layers")
    return np.array(expert_bytes, dtype=np.int64)


def units_L(topology: Topology, expert_bytes: ExpertBytes | None) -> NDArray[np.int64]:
    """What an expert of each layer takes of a capacity: 1, or its bytes where sizes differ. int64 [L]."""
    if expert_bytes is None or isinstance(expert_bytes, int):
        return np.ones(topology.layers, dtype=np.int64)
    return bytes_L(topology, expert_bytes)


def unit_bytes(expert_bytes: ExpertBytes) -> int:
    """Bytes of one unit of a capacity."""
    return expert_bytes if isinstance(expert_bytes, int) else 1


def all_units(topology: Topology, expert_bytes: ExpertBytes | None) -> int:
    """The capacity that holds every expert there is."""
    return int((units_L(topology, expert_bytes) * topology.experts_L).sum())


def split_by_layer(topology: Topology, capacity: int, expert_bytes: ExpertBytes | None) -> NDArray[np.int64]:
    """A capacity shared among the layers in proportion to what their experts take: int64 [L].

    What remains when experts are counted goes to the first layers that have room for one more.
    """
    whole_L = units_L(topology, expert_bytes) * topology.experts_L
    everything = int(whole_L.sum())
    capacity = min(capacity, everything)
    # Whole numbers of any length: bytes times bytes pass 64 bits.
    held_L = np.array([capacity * int(whole) // everything for whole in whole_L], dtype=np.int64)
    if expert_bytes is None or isinstance(expert_bytes, int):
        room = np.flatnonzero(held_L < whole_L)
        held_L[room[: capacity - int(held_L.sum())]] += 1
    return held_L


def parse_capacity(text: str, topology: Topology, expert_bytes: ExpertBytes | None) -> int:
    """Units that are meant (see the module): at most those of all experts.

    Args:
        text: ``25%`` or ``0.25`` (of all experts of all layers; of their bytes where sizes differ), ``8GiB``,
            ``500MB``, ``32`` or ``32 experts``. Units with an i are powers of 1024, those without powers of 1000.
        topology: of the model. expert_bytes: size of one expert as it is stored; None where it is not known.

    Raises:
        SpecmoeError: it is none of these, not even one expert fits, a size is given and that of an expert unknown, or a
            number of experts is given and they are of different sizes.
    """
    everything = all_units(topology, expert_bytes)
    match = _FORM.fullmatch(text)
    if match is None:
        raise SpecmoeError(f"capacity {text!r} cannot be read; give {_SAID}")
    number, unit = float(match[1]), match[2].lower()
    if not math.isfinite(number):
        raise SpecmoeError(f"capacity of {len(match[1])} digits is too large; give {_SAID}")
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
        held = int(number * _UNITS[unit] // unit_bytes(expert_bytes))
    elif unit in {"", "expert", "experts"} and number.is_integer():
        if isinstance(expert_bytes, tuple):
            raise SpecmoeError(
                f"capacity {text!r} is a number of experts, but those of {topology.model_id} are of different sizes "
                f"({min(expert_bytes):,} to {max(expert_bytes):,} bytes); give a share like 25% or a size like 8GiB"
            )
        held = int(number)
    else:
        raise SpecmoeError(f"capacity {text!r} cannot be read; give {_SAID}")
    largest = max(expert_bytes) if isinstance(expert_bytes, tuple) else 1
    if held < largest:
        size = "" if expert_bytes is None else f" of {largest * unit_bytes(expert_bytes):,} bytes"
        raise SpecmoeError(f"capacity {text!r} holds not even one expert{size}; give more")
    return min(held, everything)


def held_at_share(
    topology: Topology, share: float, expert_bytes: ExpertBytes | None, *, per_layer: bool
) -> NDArray[np.int64]:
    """Units that each cache holds at a share of what there is: int64 [G], at least what a token of a layer needs."""
    taken_L = units_L(topology, expert_bytes)
    whole_L = taken_L * topology.experts_L
    if per_layer:
        return np.maximum(topology.top_k * taken_L, np.rint(whole_L * share).astype(np.int64))
    return np.array([max(topology.top_k * int(taken_L.max()), round(int(whole_L.sum()) * share))], dtype=np.int64)
