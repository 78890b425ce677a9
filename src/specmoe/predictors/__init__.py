"""Predictors of the experts that come next: one file each, listed in the registry."""
