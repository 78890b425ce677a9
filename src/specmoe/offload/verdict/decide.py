"""From evidence to an answer: one of three, with its reason and what to change first."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict

from specmoe.offload.verdict.evidence import Change, Evidence

__all__ = ["WORTH", "Answer", "Verdict", "decide"]

# A gain that is worth the trouble of a prefetcher, unless told otherwise.
WORTH = 0.03


class Answer(Enum):
    """The answers, and the exit code of each for scripts."""

    DO = 0
    DO_NOT = 1
    OPEN = 3


class Verdict(BaseModel):
    """An answer with its reason.

    Attributes:
        answer: ``do``, ``do_not`` or ``open``. reason: a sentence. first: what to change first; None if nothing helps.
        worth: the gain that was asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    answer: Answer
    reason: str
    first: Change | None
    worth: float


def decide(evidence: Evidence, worth: float = WORTH) -> Verdict:
    """Judge by intervals, never by the point: a gain counts when its whole interval is above ``worth``.

    The questions are asked in the order in which they are cheapest to answer: is there anything to wait for, could
    perfect knowledge help, does this predictor.
    """
    changes = [change for change in evidence.changes if "knows the future" not in change.what]
    first = max(changes, key=lambda change: change.gain.value, default=None)
    if first is not None and first.gain.low <= worth:
        first = None
    if evidence.stall_share < worth:
        reason = f"only {evidence.stall_share:.1%} of the time is spent waiting for experts: there is nothing to hide"
        return Verdict(answer=Answer.DO_NOT, reason=reason, first=None, worth=worth)
    if evidence.oracle.value <= worth:
        cause = (
            f"the link works {evidence.load:.1f} s for each second of computing, so it is full already"
            if evidence.load > 1
            else "the cache has no room to bring experts in before they are needed"
        )
        reason = f"even an oracle gains no more than {evidence.oracle.value:.1%}: {cause}"
        return Verdict(answer=Answer.DO_NOT, reason=reason, first=first, worth=worth)
    if evidence.gain is None:
        reason = f"an oracle would gain {evidence.oracle.value:.1%}, but no predictor was simulated; give --run"
        return Verdict(answer=Answer.OPEN, reason=reason, first=first, worth=worth)
    gain, name = evidence.gain, evidence.predictor
    shown = f"{gain.value:+.1%} ({gain.low:+.1%} to {gain.high:+.1%})"
    if gain.low > worth:
        share = gain.value / evidence.oracle.value
        reason = f"{name} brings {shown}, {share:.0%} of what an oracle brings"
        return Verdict(answer=Answer.DO, reason=reason, first=first, worth=worth)
    if gain.high < worth:
        reason = (
            f"{name} brings {shown} where an oracle brings {evidence.oracle.value:+.1%}: what it foresees is too "
            "uncertain or comes too late for this link"
        )
        return Verdict(answer=Answer.DO_NOT, reason=reason, first=first, worth=worth)
    reason = f"{name} brings {shown}; whether that is more than {worth:.0%} this much text does not settle"
    return Verdict(answer=Answer.OPEN, reason=reason, first=first, worth=worth)
