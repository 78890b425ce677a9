"""How often 95 % intervals of a simulated gain hold the truth, over the number of documents they are drawn from.

Documents of unequal length (log-normal, σ = 0.7) gain 10 % in the mean: normal with a standard deviation of 5 points,
or log-normal with σ = 0.8. Plain percentiles of the bootstrap stand beside the quantiles that the simulation takes.

    python benchmarks/interval_coverage.py
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from specmoe.offload.comparing import drawn_gains, levels

UNITS = (2, 3, 4, 5, 6, 8, 10, 20, 50)
_MANY = 2_000_000


def gains(kind: str, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Of made-up documents."""
    if kind == "normal":
        return rng.normal(0.1, 0.05, shape)
    return 0.1 * rng.lognormal(-0.32, 0.8, shape)


def main() -> None:
    """Print a line for each kind of gain and number of units."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=3000)
    comparisons = parser.parse_args().comparisons
    for kind in ("normal", "skewed"):
        truth = 1 / float(np.mean(1 / (1 + gains(kind, np.random.default_rng(0), (_MANY,))))) - 1
        for units in UNITS:
            rng = np.random.default_rng(units)
            held = np.zeros(2, dtype=np.int64)
            for _ in range(comparisons):
                theirs = rng.lognormal(0, 0.7, units)
                draws = drawn_gains(theirs, theirs / (1 + gains(kind, rng, (units,))))
                for place, quantiles in enumerate(((0.025, 0.975), levels(units))):
                    low, high = np.quantile(draws, quantiles)
                    held[place] += low <= truth <= high
            plain, here = 100 * held / comparisons
            print(
                f"{kind}, {units} units: plain percentiles {plain:.1f} %, as simulated {here:.1f} %, n = {comparisons}"
            )


if __name__ == "__main__":
    main()
