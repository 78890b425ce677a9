"""Rows that look like routing and are none: buffers that were never written, padding, an engine's profiling pass."""

from __future__ import annotations

import numpy as np

__all__ = ["LEAST_RUN", "alike_to_last", "blank_rows", "counting_layers", "in_runs", "run_bounds"]

# Neighbours that are routed alike in all layers may be chance; so many in a row are not.
LEAST_RUN = 8


def blank_rows(ids_TLK: np.ndarray) -> np.ndarray:
    """Rows [T] whose every layer holds one of 0 and -1 throughout, or the experts 0 to K-1."""
    found_T = np.zeros(len(ids_TLK), bool)
    first = np.flatnonzero((ids_TLK[:, :, 0] <= 0).all(1))
    if len(first):
        rows = ids_TLK[first]
        same = (rows == rows[..., :1]).all(-1)
        found_T[first] = (same | (rows == np.arange(ids_TLK.shape[2])).all(-1)).all(1)
    return found_T


def counting_layers(ids_TLK: np.ndarray) -> np.ndarray:
    """In how many layers a row [T] holds the experts 0 to K-1, in this order.

    0 where a layer holds anything else but 0 throughout, as dense ones that were numbered among the others do.
    """
    found_T = np.zeros(len(ids_TLK), np.int64)
    first = np.flatnonzero((ids_TLK[:, :, 0] == 0).all(1))
    if len(first):
        rows = ids_TLK[first]
        counting = (rows == np.arange(ids_TLK.shape[2])).all(-1)
        found_T[first] = np.where((counting | (rows == 0).all(-1)).all(1), counting.sum(1), 0)
    return found_T


def alike_to_last(ids_TLK: np.ndarray) -> np.ndarray:
    """Whether a row [T] holds the same ids as the row before it, in every slot of every layer; the first does not."""
    found_T = np.zeros(len(ids_TLK), bool)
    if len(ids_TLK) > 1:
        # Few rows agree in their first layer, so few are compared whole.
        first = np.flatnonzero((ids_TLK[1:, 0] == ids_TLK[:-1, 0]).all(-1)) + 1
        found_T[first] = (ids_TLK[first] == ids_TLK[first - 1]).all((1, 2))
    return found_T


def run_bounds(goes_on_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs begin and end (exclusive), given whether each row goes on with the run of the row before it."""
    if not len(goes_on_T):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    begins = np.flatnonzero(np.concatenate([[True], ~goes_on_T[1:]]))
    return begins, np.concatenate([begins[1:], [len(goes_on_T)]])


def in_runs(chosen_T: np.ndarray, least: int = LEAST_RUN) -> np.ndarray:
    """Rows [T] that are chosen, and so are their neighbours, ``least`` or more in a row."""
    if not chosen_T.any():
        return np.zeros(len(chosen_T), bool)
    edges = np.diff(np.concatenate([[False], chosen_T, [False]]).astype(np.int8))
    begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    long = ends - begins >= least
    steps = np.zeros(len(chosen_T) + 1, np.int64)
    steps[begins[long]], steps[ends[long]] = 1, -1
    return np.cumsum(steps)[:-1] > 0
