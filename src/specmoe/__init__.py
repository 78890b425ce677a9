"""A workbench for MoE expert speculation."""

__version__ = "0.1.0"
