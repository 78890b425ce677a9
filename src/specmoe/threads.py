"""How many threads a result may depend on: one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread while the context lasts; also a decorator.

    Sums are split by threads, so their last bits, and after some training steps a whole result, depend on how many
    there are. Whatever makes a result runs in here, in workers and in the calling process alike.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
