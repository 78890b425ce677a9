"""The list of all predictors. A new one is a file of its own and a line here."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from specmoe.errors import unknown_name
from specmoe.predictors.base import Predictor
from specmoe.predictors.contextual import ContextualGatingPredictor
from specmoe.predictors.decayed_recent import DecayedRecent
from specmoe.predictors.hierarchical import HierarchicalGatingPredictor
from specmoe.predictors.hierarchical_ensemble import HierarchicalEnsemble
from specmoe.predictors.improved import ImprovedPredictor
from specmoe.predictors.layer_frequency import LayerFrequency
from specmoe.predictors.layer_specific import LayerSpecificPredictor
from specmoe.predictors.markov import LayerMarkov
from specmoe.predictors.next_router import NextRouter
from specmoe.predictors.previous_token import PreviousToken
from specmoe.predictors.random_guess import RandomGuess
from specmoe.predictors.regularized import RegularizedSpeculationModel
from specmoe.predictors.ridge import Ridge
from specmoe.predictors.route_history import RouteHistoryPredictor
from specmoe.predictors.router_residual import RouterResidualPredictor
from specmoe.predictors.sequence_match import SequenceMatch
from specmoe.predictors.small import SmallSpeculationModel
from specmoe.predictors.tiny import TinySpeculationModel
from specmoe.predictors.token_markov import TokenMarkov
from specmoe.predictors.token_table import TokenTable
from specmoe.predictors.transformer import TransformerGatingPredictor

__all__ = ["PREDICTORS", "select"]

PREDICTORS: dict[str, type[Predictor]] = {
    predictor.__name__: predictor
    for predictor in (
        ContextualGatingPredictor,
        TransformerGatingPredictor,
        HierarchicalGatingPredictor,
        LayerSpecificPredictor,
        HierarchicalEnsemble,
        ImprovedPredictor,
        TinySpeculationModel,
        SmallSpeculationModel,
        RegularizedSpeculationModel,
        RouteHistoryPredictor,
        RouterResidualPredictor,
        RandomGuess,
        LayerFrequency,
        PreviousToken,
        DecayedRecent,
        LayerMarkov,
        TokenTable,
        TokenMarkov,
        NextRouter,
        SequenceMatch,
        Ridge,
    )
}


def select(patterns: Sequence[str] = ()) -> list[str]:
    """Names in the registry that match any of the shell-style patterns; all of them if there are none.

    Raises:
        SpecmoeError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not fnmatch.filter(PREDICTORS, pattern):
            raise unknown_name("predictor", pattern, PREDICTORS)
    return [name for name in PREDICTORS if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]
