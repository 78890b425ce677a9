"""The shape of a Mixture-of-Experts model, as far as speculation needs it."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

__all__ = ["LARGEST_EXPERT", "REFERENCE", "ExpertKey", "Topology"]


# In bytes: with the most layers and experts, the sizes of all experts together stay below 2^63.
LARGEST_EXPERT = 1 << 35


class ExpertKey(NamedTuple):
    """One expert of one MoE layer: the unit that is stored, fetched and evicted."""

    layer: int
    expert: int


class Topology(BaseModel):
    """Which experts there are and how many a token is routed to.

    Layers are MoE layers only, counted from 0 in execution order. Where layers are alike, what differs by layer is
    None and not written; given as equal numbers it becomes None.

    Attributes:
        model_id: hub id or name of the model. revision: commit or content hash of its weights.
        layers: MoE layers (L). experts: experts in a layer (E), in the largest one where they differ.
        top_k: experts a token is routed to (K).
        hidden_size: width of the router's input (D); 0 where it is not known.
        zero_experts: ids from E on that compute nothing (zero or skip experts); routers have logits for them too.
        bytes_per_expert: size of one expert's weights as stored; None where unknown, or where it differs by layer.
        experts_per_layer: experts of each layer where they differ (a pruned model). A layer has the ids below its
            number; those from there up to E do not exist in it.
        bytes_per_expert_by_layer: size of an expert of each layer where they differ (mixed quantisation).

    Raises:
        pydantic.ValidationError: a size is not positive, top_k exceeds experts, or what is given by layer does not have
            one number for each, none below top_k and E as the largest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_id: str
    revision: str = ""
    layers: int = Field(ge=1, le=4096)
    experts: int = Field(ge=1, le=32767)
    top_k: int = Field(ge=1)
    hidden_size: int = Field(ge=0, le=1 << 20)
    zero_experts: int = Field(default=0, ge=0, le=32767)
    bytes_per_expert: int | None = Field(default=None, ge=1, le=LARGEST_EXPERT)
    experts_per_layer: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    bytes_per_expert_by_layer: tuple[Annotated[int, Field(ge=1, le=LARGEST_EXPERT)], ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _alike_is_one_number(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = dict(given)
        for by_layer, common in (("experts_per_layer", "experts"), ("bytes_per_expert_by_layer", "bytes_per_expert")):
            values = given.get(by_layer)
            # One that is not of this model's layers is left for the checks below.
            whole = isinstance(values, list | tuple) and len(values) == given.get("layers")
            if whole and values == values[:1] * len(values) and given.get(common) in {None, values[0]}:
                given[by_layer], given[common] = None, values[0]
        return given

    @model_validator(mode="after")
    def _top_k_fits(self) -> Topology:
        if self.top_k > self.experts + self.zero_experts:
            raise ValueError(f"top_k {self.top_k} exceeds experts {self.experts}")
        return self

    @model_validator(mode="after")
    def _layers_fit(self) -> Topology:
        for name in ("experts_per_layer", "bytes_per_expert_by_layer"):
            values = getattr(self, name)
            if values is not None and len(values) != self.layers:
                raise ValueError(f"{name} has {len(values)} numbers for {self.layers} layers")
        counts = self.experts_per_layer
        if counts is not None and (max(counts) != self.experts or min(counts) + self.zero_experts < self.top_k):
            raise ValueError(
                f"experts_per_layer goes from {min(counts)} to {max(counts)}; the largest must be experts "
                f"({self.experts}), and none below top_k ({self.top_k})"
            )
        if self.bytes_per_expert_by_layer is not None and self.bytes_per_expert is not None:
            raise ValueError("give bytes_per_expert or bytes_per_expert_by_layer, not both")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_alike(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What older releases wrote, and hashes of it, stays the same for models whose layers are alike.
        content = handler(self)
        return {
            name: value
            for name, value in content.items()
            if value is not None or name not in {"experts_per_layer", "bytes_per_expert_by_layer"}
        }

    @property
    def experts_L(self) -> tuple[int, ...]:
        """Experts of each layer."""
        return self.experts_per_layer or (self.experts,) * self.layers

    @property
    def all_experts(self) -> int:
        """Experts of all layers together."""
        return sum(self.experts_L)

    @property
    def experts_text(self) -> str:
        """Experts in a layer, for people: ``64``, or ``28 to 56`` where layers differ."""
        counts = self.experts_per_layer
        return str(self.experts) if counts is None else f"{min(counts)} to {max(counts)}"

    @property
    def expert_bytes(self) -> int | tuple[int, ...] | None:
        """Size of an expert: one number where all are of one size, else one for each layer; None where unknown."""
        return self.bytes_per_expert_by_layer or self.bytes_per_expert

    @property
    def router_classes(self) -> int:
        """What a router chooses among: experts and zero experts."""
        return self.experts + self.zero_experts

    def place(self, source_layer: int, horizon: int) -> tuple[int, int]:
        """Where a horizon points: (tokens ahead, layer). Past the last layer it goes on at the next token."""
        return divmod(source_layer + horizon, self.layers)


# The shape that the original research script was written for; parameter counts are stated at it.
REFERENCE = Topology(model_id="reference", layers=6, experts=8, top_k=1, hidden_size=512)
