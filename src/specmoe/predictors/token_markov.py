"""Token table and Markov together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from specmoe.dataset import Window
from specmoe.predictors.base import Knowledge, Predictor, Recipe
from specmoe.predictors.markov import LayerMarkov
from specmoe.predictors.token_table import TokenTable
from specmoe.topology import Topology

__all__ = ["TokenMarkov"]


class TokenMarkov(Predictor):
    """The product of what the token id and what the source's experts say (naive Bayes).

    P(target | id, source) is proportional to P(target | id) P(target | source) / P(target).
    """

    recipe: ClassVar[Recipe] = Recipe(
        category="training-free", sees="token", source="naive Bayes of the token table and layer Markov"
    )

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        self.table = TokenTable(topology, horizons)
        self.markov = LayerMarkov(topology, horizons)

    def prepare(self, knowledge: Knowledge) -> None:
        """Count both tables."""
        self.table.prepare(knowledge)
        self.markov.prepare(knowledge)

    def forward(self, window: Window) -> Tensor:
        """Log-probabilities [B, T, S, H, E]."""
        frequency_SHE = self.markov.share_LE[self.markov.layer_SH].log()
        return (self.table(window) + self.markov(window) - frequency_SHE).log_softmax(-1)
