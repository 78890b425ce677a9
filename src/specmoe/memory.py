"""How much memory there is, and saying beforehand what does not fit into it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from specmoe.errors import SpecmoeError

__all__ = ["check_fits", "memory_bytes", "ran_out"]

# What limits a container: the second generation of control groups, and the first.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@cache
def memory_bytes() -> int:
    """Bytes of memory of this machine, or of the container that limits this process."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in _LIMITS:
        try:
            total = min(total, int(file.read_text()))
        except (OSError, ValueError):  # No such control group, or no limit ("max").
            continue
    return total


def check_fits(needed: int, what: str, advice: str) -> None:
    """Refuse to build what cannot fit, before anything of it is built.

    Args:
        needed: its bytes. what: its name, as the subject of a sentence. advice: what to lower.

    Raises:
        SpecmoeError: it would take more than all the memory there is.
    """
    if needed > memory_bytes():
        there = f"there are {memory_bytes() / 1e9:,.1f} GB"
        raise SpecmoeError(f"{what} would take {needed / 1e9:,.1f} GB of memory, and {there}; {advice}")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's own and numpy's, and PyTorch's on CPU and GPU."""
    if isinstance(error, MemoryError):
        return True
    # PyTorch's CPU allocator raises a plain RuntimeError; the text is all that tells it from others.
    said = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "not enough memory" in said or "can't allocate memory" in said or "out of memory" in said
    )
