"""What all models of files have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["FileModel"]


class FileModel(BaseModel):
    """Base of what is kept in a file of ours: frozen, nothing unknown in it, and every number one to work with.

    NaN and infinity are no JSON, and a comparison with NaN holds for no number, so that one would pass every check.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)
