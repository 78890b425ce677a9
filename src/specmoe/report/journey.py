"""The token journey as the page draws it: which experts a stretch of text visits, and which were foreseen."""

from __future__ import annotations

from typing import Any

from specmoe.results import Journey, Results

__all__ = ["foreseen_share", "journey_data"]


def foreseen_share(journey: Journey, predictor: str, horizon: int) -> tuple[int, int]:
    """How many of the experts visited were foreseen, and how many could have been."""
    hits = total = 0
    for visited_row, foreseen_row in zip(journey.actual, journey.predictions[predictor][horizon], strict=True):
        for visited, foreseen in zip(visited_row, foreseen_row, strict=True):
            if foreseen is not None:
                needed = {expert for expert in visited if expert >= 0}
                total += len(needed)
                hits += len(needed & set(foreseen))
    return hits, total


def journey_data(results: Results) -> dict[str, Any] | None:
    """What the page needs to draw the journey, None if there is none.

    ``predictions`` holds predictor → horizon → the experts foreseen per token and layer (null where nothing
    could have foreseen them), ``shares`` the counts of ``foreseen_share``. Predictors come best first.
    """
    journey = results.journey
    if journey is None or not journey.predictions:
        return None
    first = results.protocol.horizons[0]
    order = sorted(journey.predictions, key=lambda name: -_level(results, name, first))
    return {
        "document": journey.document,
        "tokens": [visible(token) for token in journey.tokens],
        "actual": journey.actual,
        "predictors": order,
        "predictions": {name: journey.predictions[name] for name in order},
        "shares": {name: {h: foreseen_share(journey, name, h) for h in journey.predictions[name]} for name in order},
    }


def visible(token: str) -> str:
    """A token's text with its white space shown."""
    shown = token.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    return shown or "∅"


def _level(results: Results, name: str, horizon: int) -> float:
    scores = [r.scores.get("recall@K", {}).get(horizon) for r in results.predictors if r.name == name]
    return next((score.value for score in scores if score is not None), -1.0)
