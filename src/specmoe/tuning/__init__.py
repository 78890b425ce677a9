"""Looking for a better recipe, by the validation part alone.

A search is a study of Optuna (Akiba et al., 2019) kept in a journal on disk: trials are proposed by a tree-structured
Parzen estimator (Bergstra et al., 2011), the first of them is the recipe in force, and poor ones are stopped early.
"""

from specmoe.tuning.outcome import (
    Outcome,
    Search,
    apply_recipe,
    command_to_train,
    evidence_in_words,
    gain_in_words,
    load_tuning,
)
from specmoe.tuning.page import write_picture
from specmoe.tuning.run import TrialNews, tune

__all__ = [
    "Outcome",
    "Search",
    "TrialNews",
    "apply_recipe",
    "command_to_train",
    "evidence_in_words",
    "gain_in_words",
    "load_tuning",
    "tune",
    "write_picture",
]
