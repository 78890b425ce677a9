"""A workbench for MoE expert speculation."""

# The only place that says it: packaging, `specmoe --version` and results files read it from here.
__version__ = "0.1.0"
