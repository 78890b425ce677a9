"""Runs of tokens that are routed alike in every layer, counted while a trace streams by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specmoe.diagnostics.blocks import Block
from specmoe.sources.unrouted import LEAST_RUN, run_bounds

__all__ = ["AlikeRuns"]


@dataclass(frozen=True)
class _Open:
    """The run at the end of what was read, which the next block may continue."""

    document: int
    next_position: int
    ids_KL: np.ndarray
    token: int
    length: int
    one_token: bool


class AlikeRuns:
    """Sums over runs of :data:`~specmoe.sources.unrouted.LEAST_RUN` tokens or more, each within one document.

    Tokens without any expert are no routing, and not counted.

    Attributes:
        tokens: in runs whose token ids are unknown or differ. repeats: in runs of one known token id.
        runs: how many there are of the former. longest: length and document of the longest of them.
    """

    def __init__(self) -> None:
        self.tokens = self.repeats = self.runs = 0
        self.longest = (0, -1)
        self._open: _Open | None = None

    def take(self, block: Block) -> None:
        """Add a block; :meth:`close` follows the last one."""
        goes_on_T = self._goes_on(block)
        begins, ends = run_bounds(goes_on_T)
        tokens_T = block.token_ids_T
        other_T = np.concatenate([[0], tokens_T[1:] != tokens_T[:-1]]) | (tokens_T < 0)
        other_T[begins] = tokens_T[begins] < 0
        one_token_R = np.add.reduceat(other_T, begins) == 0
        length_R = ends - begins
        last = self._open
        if last is not None and goes_on_T[0]:
            length_R[0] += last.length
            one_token_R[0] &= last.one_token and last.token == int(tokens_T[0])
        elif last is not None:
            self._add(last.length, last.one_token, last.document, last.ids_KL)
        for run in np.flatnonzero(length_R[:-1] >= LEAST_RUN).tolist():
            at = int(begins[run])
            run_ids_KL = block.expert_ids_KLT[..., at]
            self._add(int(length_R[run]), bool(one_token_R[run]), int(block.document_T[at]), run_ids_KL)
        self._open = _Open(
            int(block.document_T[-1]),
            int(block.position_T[-1]) + 1,
            block.expert_ids_KLT[..., -1].copy(),
            int(tokens_T[-1]),
            int(length_R[-1]),
            bool(one_token_R[-1]),
        )

    def close(self) -> None:
        """Count the last run."""
        if self._open is not None:
            self._add(self._open.length, self._open.one_token, self._open.document, self._open.ids_KL)
            self._open = None

    def _goes_on(self, block: Block) -> np.ndarray:
        """Whether a token is routed as the one before it in the same document, [T]."""
        ids_KLT, follows_T = block.expert_ids_KLT, block.follows_T
        goes_on_T = np.zeros(len(block), bool)
        # Few tokens agree in their first slots, so few are compared whole.
        first = np.flatnonzero((ids_KLT[0, :, 1:] == ids_KLT[0, :, :-1]).all(0) & follows_T[1:]) + 1
        goes_on_T[first] = (ids_KLT[..., first] == ids_KLT[..., first - 1]).all((0, 1))
        last = self._open
        if last is not None and (last.document, last.next_position) == (block.document_T[0], block.position_T[0]):
            goes_on_T[0] = np.array_equal(last.ids_KL, ids_KLT[..., 0])
        return goes_on_T

    def _add(self, length: int, one_token: bool, document: int, ids_KL: np.ndarray) -> None:
        if length < LEAST_RUN or (ids_KL < 0).all():
            return
        if one_token:
            self.repeats += length
            return
        self.tokens += length
        self.runs += 1
        self.longest = max(self.longest, (length, document), key=lambda run: run[0])
