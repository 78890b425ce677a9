"""Single events without PyTorch's overhead: the same numbers from a handful of compiled loops."""
