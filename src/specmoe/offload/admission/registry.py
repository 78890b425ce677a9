"""The rules of admission by name, and the one number that each of them takes."""

from __future__ import annotations

from dataclasses import dataclass

from specmoe.errors import SpecmoeError, unknown_name

__all__ = ["ADMISSIONS", "Admission", "parse_admission"]

TOP, CONFIDENCE, EXPECTED_VALUE = range(3)


@dataclass(frozen=True)
class Rule:
    """number: in compiled code. default: of its parameter, None for twice K. says: what the parameter means."""

    number: int
    default: float | None
    says: str


ADMISSIONS = {
    "top": Rule(TOP, None, "the first b experts of each prediction; b, by default K"),
    "confidence": Rule(CONFIDENCE, 0.5, "experts whose calibrated chance is at least p; p, by default .5"),
    "expected-value": Rule(EXPECTED_VALUE, 0.0, "prefetches expected to save more seconds than they cost; by how many"),
}


@dataclass(frozen=True)
class Admission:
    """A rule and its parameter."""

    name: str
    parameter: float

    @property
    def number(self) -> int:
        """In compiled code."""
        return ADMISSIONS[self.name].number

    def __str__(self) -> str:
        return self.name if self.name == "expected-value" and not self.parameter else f"{self.name}:{self.parameter:g}"


def parse_admission(text: str, top_k: int) -> Admission:
    """Read ``top:8``, ``confidence:0.5`` or ``expected-value``.

    Args:
        top_k: K, the default budget of ``top``.

    Raises:
        SpecmoeError: no such rule, or no such parameter.
    """
    name, _, value = text.partition(":")
    if name not in ADMISSIONS:
        raise unknown_name("admission", name, ADMISSIONS)
    default = ADMISSIONS[name].default
    try:
        parameter = float(value) if value else (float(top_k) if default is None else default)
    except ValueError:
        raise SpecmoeError(f"{text!r}: {value!r} is not a number; give {name} {ADMISSIONS[name].says}") from None
    sensible = {"top": 1 <= parameter < 1e6, "confidence": 0 <= parameter <= 1, "expected-value": abs(parameter) < 1e6}
    if not sensible[name]:
        raise SpecmoeError(f"{text!r}: {parameter:g} cannot be; give {name} {ADMISSIONS[name].says}")
    return Admission(name, parameter)
