"""The eviction policies by name: one line each. Their numbers are what the compiled code knows them by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specmoe.errors import unknown_name
from specmoe.offload.policies import dispatch

__all__ = ["POLICIES", "PolicyInfo", "policy_named"]


@dataclass(frozen=True)
class PolicyInfo:
    """What is known of a policy.

    Attributes:
        number: that of ``policies.dispatch``. title: for tables and plots. source: paper and year.
        needs: what it must be told: nothing, the future (``next_use_N``) or a predictor (``wanted_N``).
        doc: what leaves first, in a sentence.
    """

    number: int
    title: str
    source: str
    needs: Literal["", "future", "predictor"]
    doc: str


POLICIES: dict[str, PolicyInfo] = {
    "lru": PolicyInfo(dispatch.LRU, "LRU", "Mattson et al., 1970", "", "least recently used"),
    "lfu": PolicyInfo(dispatch.LFU, "LFU", "Arlitt et al., 2000", "", "fewest uses since it came in"),
    "lfu-aged": PolicyInfo(
        dispatch.LFU_AGED, "LFU with ageing", "Arlitt et al., 2000", "", "fewest uses, on top of the cache's age"
    ),
    "slru": PolicyInfo(
        dispatch.SLRU, "SLRU", "Karedla et al., 1994", "", "oldest of the lowest of four segments; uses lift"
    ),
    "s3-fifo": PolicyInfo(
        dispatch.S3_FIFO, "S3-FIFO", "Yang et al., 2023", "", "what failed its trial in a small queue"
    ),
    "sieve": PolicyInfo(
        dispatch.SIEVE, "SIEVE", "Zhang et al., 2024", "", "what was not used since a hand passed it in a FIFO queue"
    ),
    "least-stale": PolicyInfo(
        dispatch.LEAST_STALE, "Least-Stale", "Hoang et al., 2026", "", "what the current forward pass has not used"
    ),
    "predicted": PolicyInfo(dispatch.PREDICTED, "predicted", "", "predictor", "what the predictor wants least"),
    "belady": PolicyInfo(dispatch.BELADY, "Belady", "Belady, 1966", "future", "furthest next use; every miss is kept"),
    "belady-bypass": PolicyInfo(
        dispatch.BELADY_BYPASS,
        "Belady with bypass",
        "Belady, 1966",
        "future",
        "furthest next use, be it that of the missed expert itself",
    ),
}


def policy_named(name: str) -> PolicyInfo:
    """A policy of the registry.

    Raises:
        SpecmoeError: there is none of that name; the message has the nearest ones.
    """
    if name not in POLICIES:
        raise unknown_name("eviction policy", name, POLICIES)
    return POLICIES[name]
