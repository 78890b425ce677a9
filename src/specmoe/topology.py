"""The shape of a Mixture-of-Experts model, as far as speculation needs it."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["REFERENCE", "ExpertKey", "Topology"]


class ExpertKey(NamedTuple):
    """One expert of one MoE layer: the unit that is stored, fetched and evicted."""

    layer: int
    expert: int


class Topology(BaseModel):
    """Which experts there are and how many a token is routed to.

    Layers are MoE layers only, counted from 0 in execution order.

    Attributes:
        model_id: hub id or name of the model. revision: commit or content hash of its weights.
        layers: MoE layers (L). experts: experts in a layer (E). top_k: experts a token is routed to (K).
        hidden_size: width of the router's input (D); 0 where it is not known.
        zero_experts: ids from E on that compute nothing (zero or skip experts); routers have logits for them too.
        bytes_per_expert: size of one expert's weights as stored; None where unknown.

    Raises:
        pydantic.ValidationError: a size is not positive, or top_k exceeds experts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_id: str
    revision: str = ""
    layers: int = Field(ge=1, le=4096)
    experts: int = Field(ge=1, le=32767)
    top_k: int = Field(ge=1)
    hidden_size: int = Field(ge=0, le=1 << 20)
    zero_experts: int = Field(default=0, ge=0, le=32767)
    bytes_per_expert: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _top_k_fits(self) -> Topology:
        if self.top_k > self.experts + self.zero_experts:
            raise ValueError(f"top_k {self.top_k} exceeds experts {self.experts}")
        return self

    @property
    def router_classes(self) -> int:
        """What a router chooses among: experts and zero experts."""
        return self.experts + self.zero_experts

    def place(self, source_layer: int, horizon: int) -> tuple[int, int]:
        """Where a horizon points: (tokens ahead, layer). Past the last layer it goes on at the next token."""
        return divmod(source_layer + horizon, self.layers)


# The shape that the original research script was written for; parameter counts are stated at it.
REFERENCE = Topology(model_id="reference", layers=6, experts=8, top_k=1, hidden_size=512)
