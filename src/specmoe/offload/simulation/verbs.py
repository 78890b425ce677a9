"""The policies' verbs as functions of their own: inlined at each of their many uses, they take minutes to compile."""

from __future__ import annotations

from specmoe.offload.compiled import compiled
from specmoe.offload.policies import dispatch
from specmoe.offload.policies.state import PolicyState

__all__ = ["hit", "insert", "victim"]


@compiled()
def hit(policy: int, state: PolicyState, key: int, now: int) -> None:
    """As :func:`specmoe.offload.policies.dispatch.hit`."""
    dispatch.hit(policy, state, key, now)


@compiled()
def insert(policy: int, state: PolicyState, key: int, now: int) -> None:
    """As :func:`specmoe.offload.policies.dispatch.insert`."""
    dispatch.insert(policy, state, key, now)


@compiled()
def victim(policy: int, state: PolicyState, group: int, now: int) -> int:
    """As :func:`specmoe.offload.policies.dispatch.victim`."""
    return dispatch.victim(policy, state, group, now)
