"""The loops that a compiled ``step`` is made of. All arrays are float32 and contiguous.

At batch 1 a prediction is a few matrix-vector products of some ten thousand numbers each. PyTorch spends more time on
deciding how to do them than on doing them; here they are compiled once (Numba; Lam et al., 2015) and called as one.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["F32", "add_product", "gelu", "mixed", "scaled_norm"]

_HALF_ROOT = np.float32(math.sqrt(0.5))

F32 = NDArray[np.float32]


@njit(fastmath=True)
def add_product(vector: F32, matrix: F32, out: F32) -> None:
    """Out [X] += vector [C] · matrix [C, X], four rows at a time so that ``out`` is read a quarter as often."""
    rows = vector.shape[0]
    whole = rows - rows % 4
    for i in range(0, whole, 4):
        a, b, c, d = vector[i], vector[i + 1], vector[i + 2], vector[i + 3]
        for j in range(out.shape[0]):
            out[j] += a * matrix[i, j] + b * matrix[i + 1, j] + c * matrix[i + 2, j] + d * matrix[i + 3, j]
    for i in range(whole, rows):
        for j in range(out.shape[0]):
            out[j] += vector[i] * matrix[i, j]


@njit(fastmath=True)
def gelu(values: F32) -> None:
    """Gaussian error linear units in place (Hendrycks & Gimpel, 2016)."""
    for i in range(values.shape[0]):
        values[i] = (
            np.float32(0.5) * values[i] * (np.float32(1.0) + math.erf(values[i] * np.float32(0.7071067811865476)))
        )


@njit(fastmath=True)
def scaled_norm(values: F32, weight: F32, bias: F32, out: F32) -> None:
    """Layer normalisation (Ba et al., 2016) of ``values`` [C] into ``out``."""
    count = values.shape[0]
    mean = np.float32(0.0)
    for i in range(count):
        mean += values[i]
    mean /= count
    variance = np.float32(0.0)
    for i in range(count):
        variance += (values[i] - mean) * (values[i] - mean)
    factor = np.float32(1.0) / np.sqrt(variance / count + np.float32(1e-5))
    for i in range(count):
        out[i] = (values[i] - mean) * factor * weight[i] + bias[i]


@njit(fastmath=True)
def mixed(features: F32, weight_in: F32, bias_in: F32, weight_out: F32, bias_out: F32, spare: F32, inner: F32) -> None:
    """Features += W_out · gelu(W_in · spare + b_in) + b_out, where ``spare`` [C] is the normalised input.

    ``inner`` [C] is overwritten.
    """
    inner[:] = bias_in
    add_product(spare, weight_in, inner)
    gelu(inner)
    for i in range(features.shape[0]):
        features[i] += bias_out[i]
    add_product(inner, weight_out, features)
