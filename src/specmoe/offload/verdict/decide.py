"""From evidence to an answer: one of three, with its reason and what to change first."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict

from specmoe.offload.comparing import FEWEST_UNITS
from specmoe.offload.results import Gain
from specmoe.offload.verdict.evidence import Change, Evidence
from specmoe.offload.words import gain_sentence

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
    perfect knowledge help, does this predictor. Only what a bound proves is answered without an interval.
    """
    answer, reason = _answer(evidence, worth)
    sure = [each for each in evidence.changes if each.buildable and _above(each.gain, worth)]
    first = max(sure, key=lambda change: change.gain.value, default=None)
    return Verdict(answer=answer, reason=reason, first=first, worth=worth)


def _answer(e: Evidence, worth: float) -> tuple[Answer, str]:
    oracle = gain_sentence(e.oracle, e.independent)
    # What is gained if nothing is waited for any more: share / (1 - share).
    if e.stall_share <= worth * (1 - e.stall_share):
        return (
            Answer.DO_NOT,
            f"only {e.stall_share:.1%} of the time is spent waiting for experts: there is nothing to hide",
        )
    if e.bound is not None and e.bound <= worth:
        why = "the experts that any cache of this size must load keep the link busy for nearly as long"
        return Answer.DO_NOT, f"even perfect knowledge gains no more than {e.bound:.1%}: {why}"
    if e.oracle.high is not None and e.oracle.high <= worth:
        cause = (
            f"the link works {e.load:.1f} s for each second of computing, so it is full already"
            if e.load > 1
            else "the cache seems to have no room to bring experts in before they are needed"
        )
        return Answer.DO_NOT, f"even an oracle brings no more than {oracle}: {cause}"
    if e.gain is None:
        lacking = f"no predictor was simulated: {e.unsplit}" if e.unsplit else "no predictor was simulated; give --run"
        return Answer.OPEN, f"an oracle brings {oracle}, but {lacking}"
    name, shown = e.predictor, gain_sentence(e.gain, e.independent)
    if e.gain.low is None or e.gain.high is None:
        return Answer.OPEN, f"{name} brings {shown}, and that settles nothing: {_more_text(e)}"
    if e.gain.low > worth:
        if e.learned:
            return Answer.OPEN, (
                f"{name} brings {shown}, but {e.learned} of the {e.documents} documents are ones that it learned from "
                "or was chosen by; judge it on others (--documents test)"
            )
        share = f", {e.gain.value / e.oracle.value:.0%} of what an oracle brings" if e.oracle.value > 0 else ""
        return Answer.DO, f"{name} brings {shown}{share}"
    if e.gain.high < worth:
        better = max(
            (each for each in e.admissions if _above(each.gain, worth)), key=lambda each: each.gain.value, default=None
        )
        if better is not None:
            return Answer.OPEN, (
                f"{name} brings {shown} by {e.admission}, but {gain_sentence(better.gain, e.independent)} by "
                f"{better.what}, which was chosen on this very text: simulate that admission on other text"
            )
        return Answer.DO_NOT, (
            f"{name} brings {shown} where an oracle brings {oracle}: what it foresees is too uncertain or comes too "
            "late for this link"
        )
    return Answer.OPEN, f"{name} brings {shown}; whether that is more than {worth:.0%} this much text does not settle"


def _above(gain: Gain, worth: float) -> bool:
    return gain.low is not None and gain.low > worth


def _more_text(e: Evidence) -> str:
    """What to do about too few units, and how many there are."""
    ways = ["give a trace of more documents" + (" (three in ten are the test part)" if e.part == "test" else "")]
    if e.documents > e.oracle.units:
        ways.append("take smaller batches (--batch)" if e.batch > 1 else "of more groups")
    ways.append("leave --max-tokens out if it is given")
    return f"an interval takes {FEWEST_UNITS} independent documents, and this is {e.independent}; {', or '.join(ways)}"
