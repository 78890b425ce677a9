"""Results of studies made up for the tests of what is shown."""

from __future__ import annotations

from results_fixture import full_results
from specmoe.results import Interval
from specmoe.suite.study_results import (
    CurvePoint,
    CurveResult,
    DomainResult,
    DomainStudy,
    HeldOut,
    LearningCurve,
    Studied,
)

EVIL = "</script><script>alert('domain')</script>"
_WHOLE = full_results()
_RECALLS = {"HierarchicalEnsemble": (0.70, 0.78, 0.84, 0.884), "Ridge": (0.83, 0.84, 0.85, 0.852), EVIL: (0.6,) * 4}
_PREDICTORS = (
    Studied(name="HierarchicalEnsemble", category="ensemble", sees="context", learned=True),
    Studied(name="Ridge", category="training-free", sees="hidden", learned=False),
    Studied(name=EVIL, category="edge", sees="hidden", learned=True),
    Studied(name="NextRouter", category="training-free", sees="hidden", learned=False, reason="no routers & such"),
)


def around(value: float, half: float = 0.01) -> Interval:
    """An interval of a given half-width."""
    return Interval(value=value, low=value - half, high=value + half)


def by_horizon(value: float, half: float = 0.01) -> dict[int, Interval]:
    """Falling a little with each horizon."""
    return {h: around(value - 0.03 * (h - 1), half) for h in _WHOLE.protocol.horizons}


def curve_study() -> LearningCurve:
    """Four shares, three predictors, one without a result."""
    shares = (0.125, 0.25, 0.5, 1.0)
    return LearningCurve(
        made=_WHOLE.made,
        trace=_WHOLE.trace,
        protocol=_WHOLE.protocol,
        test_documents=60,
        validation_documents=30,
        predictors=_PREDICTORS,
        points=tuple(
            CurvePoint(
                share=share,
                documents=round(96 * share),
                tokens=round(40_000 * share),
                split_hash=f"{place:04d}",
                results=tuple(
                    CurveResult(
                        name=name,
                        seeds=3,
                        recall=by_horizon(values[place]),
                        gain={h: around(values[place] - values[place - 1], 0.005) for h in (1, 2, 3, 4)}
                        if place
                        else {},
                    )
                    for name, values in _RECALLS.items()
                ),
            )
            for place, share in enumerate(shares)
        ),
    )


def domain_study() -> DomainStudy:
    """Three domains, one of a hostile name, and one left out."""

    def fallen(name: str, drop: float) -> DomainResult:
        seen = _RECALLS[name][-1]
        drops = {h: around(drop, 0.02) for h in (1, 2, 3, 4)}
        unseen = by_horizon(seen - drop)
        return DomainResult(name=name, seen=by_horizon(seen), unseen=unseen, drop=drops, own_drop=drops, whole=unseen)

    domains = {"xml": 0.05, EVIL: 0.01, "": -0.04}
    return DomainStudy(
        made=_WHOLE.made,
        trace=_WHOLE.trace,
        protocol=_WHOLE.protocol,
        split_hash="5c1de0aa94b7f213",
        train_documents=200,
        predictors=_PREDICTORS,
        domains=tuple(
            HeldOut(
                domain=domain,
                documents=40,
                test_documents=12,
                train_documents=170,
                matched_documents=170,
                split_hash="0000",
                results=tuple(fallen(name, drop) for name in _RECALLS),
            )
            for domain, drop in domains.items()
        ),
        left_out={"tiny": "1 of its documents in the test part; 2 are needed"},
        together=tuple(fallen(name, 0.03) for name in _RECALLS),
    )
