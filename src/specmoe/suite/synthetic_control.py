"""A source of which the best possible recall is known: nobody may beat it, and somebody must come close."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch

from specmoe.evaluation import Ratios, by_horizon, evaluate
from specmoe.predictors.registry import PREDICTORS
from specmoe.results import ByHorizon, Control
from specmoe.sources.synthetic import optimal_recall, synthetic_trace
from specmoe.suite.data import SuiteData
from specmoe.topology import Topology
from specmoe.training import fit

__all__ = ["HORIZONS", "judged", "synthetic_controls", "synthetic_recalls"]

HORIZONS: tuple[int, ...] = (1, 4)
_TOPOLOGY = Topology(model_id="synthetic", layers=4, experts=8, top_k=2, hidden_size=16)
_DETERMINISM, _SEED = 0.8, 11
# What all training-free predictors and one small learned one take a second or two for, on one core.
_DOCUMENTS, _TOKENS = 120, 48
_LEARNED = "TinySpeculationModel"
# Points of recall@K at the first horizon by which the strongest may miss the optimum.
_CLOSE = 0.02


@cache
def synthetic_controls() -> tuple[Control, ...]:
    """Judge predictors on Markov routing. The same every time, so it is done once a process."""
    return judged(synthetic_recalls(), {h: optimal_recall(_TOPOLOGY, _DETERMINISM, _SEED, h) for h in HORIZONS})


def synthetic_recalls() -> dict[str, ByHorizon]:
    """recall@K of every training-free predictor that the source has the inputs for, and of the smallest learned one.

    The larger learned ones would take minutes and meet the same evaluation.
    """
    recalls = {}
    with tempfile.TemporaryDirectory(prefix="specmoe-control-") as folder, torch.random.fork_rng(devices=[]):
        synthetic_trace(
            Path(folder) / "trace",
            topology=_TOPOLOGY,
            documents=_DOCUMENTS,
            tokens=_TOKENS,
            determinism=_DETERMINISM,
            seed=_SEED,
        )
        data = SuiteData.load(Path(folder) / "trace", HORIZONS)
        for name, kind in PREDICTORS.items():
            if (kind.recipe.epochs == 0 or name == _LEARNED) and not data.lacks(kind):
                torch.manual_seed(0)
                predictor = kind(data.topology, HORIZONS)
                fit(predictor, data.train, data.validation, data.knowledge, seed=0)
                tally = evaluate(predictor, data.evaluated["test"], only_recall=True)
                recalls[name] = by_horizon(Ratios.of([tally], "recall@K"), HORIZONS)
    return recalls


def judged(recalls: dict[str, ByHorizon], optimum: dict[int, float]) -> tuple[Control, ...]:
    """The two controls: the optimum is not passed by more than chance allows, and it is reached.

    Args:
        recalls: predictor → recall@K by horizon. optimum: the best possible one by horizon.
    """
    excess = {(name, h): by_h[h].value - optimum[h] for name, by_h in recalls.items() for h in optimum}
    (name, horizon), most = max(excess.items(), key=lambda item: item[1])
    above = sorted({n for n, by_h in recalls.items() for h in optimum if by_h[h].low > optimum[h]})
    first = min(optimum)
    nearest = max(recalls, key=lambda n: recalls[n][first].value)
    gap = optimum[first] - recalls[nearest][first].value
    known = ", ".join(f"{100 * optimum[h]:.1f} % at h={h}" for h in optimum)
    return (
        Control(
            name="synthetic source: highest recall@K minus the known optimum",
            expected="not above 0 at 95 % confidence, for any predictor at any horizon",
            value=round(100 * most, 3),
            unit="points",
            holds=not above,
            note=(
                f"optimum {known}; highest: {name} at h={horizon}, of {len(recalls)} predictors"
                + (f"; above it: {', '.join(above)}" if above else "")
            ),
        ),
        Control(
            name=f"synthetic source: the known optimum minus the strongest (h = {first}, recall@K)",
            expected=f"at most {100 * _CLOSE:g} points: what can be known is found",
            value=round(100 * gap, 3),
            unit="points",
            holds=gap <= _CLOSE,
            note=f"strongest: {nearest}",
        ),
    )
