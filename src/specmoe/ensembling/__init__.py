"""Several trained predictors as one: what blending them gains, what it costs, and what a small student keeps of it."""

from specmoe.ensembling.blend import Blend, load_blend, save_blend
from specmoe.ensembling.outcome import EnsembleResult, load_ensemble
from specmoe.ensembling.run import ensemble

__all__ = ["Blend", "EnsembleResult", "ensemble", "load_blend", "load_ensemble", "save_blend"]
