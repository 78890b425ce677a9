"""The routing of one document, as tensors."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from specmoe.errors import SpecmoeError
from specmoe.topology import Topology

__all__ = ["FIELDS", "REQUIRED_FIELDS", "Phase", "RoutingRecord", "field_shape", "is_finite"]


class Phase(enum.IntEnum):
    """How the model came to a token: reading given text, or writing its own."""

    PREFILL = 0
    DECODE = 1


@dataclass(frozen=True)
class RoutingRecord:
    """One document's routing: T tokens through L MoE layers.

    Attributes:
        token_ids: [T] int32, -1 where it is not known which token it was.
        phase: [T] uint8, values of :class:`Phase`.
        expert_ids: [T, L, K] int16; -1 where a slot was served by no expert (dropped over capacity),
            ids of E and above are kept as the model gave them (zero or skip experts).
        gate_weights: [T, L, K] float32, the weight of each expert's output; None if not kept.
        router_logits: [T, L, E + zero experts] float32; None if not kept.
        hidden: [T, L, D] float16, bfloat16 or float32, the input of each layer's router; None if not
            kept for this document.
    """

    token_ids: Tensor
    phase: Tensor
    expert_ids: Tensor
    gate_weights: Tensor | None = None
    router_logits: Tensor | None = None
    hidden: Tensor | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The fields that are present, by name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    def check(self, topology: Topology) -> None:
        """Make sure that shapes and dtypes are those of ``topology`` and that every number is finite.

        Raises:
            SpecmoeError: one of them is not; the message names the field.
        """
        for name, tensor in self.tensors():
            expected = (len(self), *field_shape(name, topology))
            if tuple(tensor.shape) != expected:
                raise SpecmoeError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")
            if tensor.dtype not in FIELDS[name]:
                allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in FIELDS[name])
                raise SpecmoeError(f"{name} has dtype {tensor.dtype}, expected {allowed}")
            if tensor.is_floating_point() and not is_finite(tensor):
                row, layer = (~torch.isfinite(tensor)).flatten(2).any(-1).nonzero()[0].tolist()
                hint = " (float16 overflows early, bfloat16 does not)" if tensor.dtype == torch.float16 else ""
                raise SpecmoeError(
                    f"{name} holds NaN or Inf at token {row} in MoE layer {layer}; the model's run is at fault{hint}"
                )
        if len(self) and int(self.phase.max()) > max(Phase):
            raise SpecmoeError(f"phase holds {int(self.phase.max())}; known: 0 (prefill), 1 (decode)")
        if len(self) and int(self.expert_ids.min()) < -1:
            raise SpecmoeError(f"expert_ids holds {int(self.expert_ids.min())}; only -1 (no expert) may be negative")
        if len(self) and topology.experts_per_layer is not None:
            self._check_layers(topology)

    def _check_layers(self, topology: Topology) -> None:
        """No layer may name an expert that it does not have."""
        counts_L1 = torch.tensor(topology.experts_L)[:, None]
        absent = (self.expert_ids >= counts_L1) & (self.expert_ids < topology.experts)
        if absent.any():
            row, layer, slot = absent.nonzero()[0].tolist()
            raise SpecmoeError(
                f"expert_ids holds {int(self.expert_ids[row, layer, slot])} at token {row} in MoE layer {layer}, which "
                f"has {topology.experts_L[layer]} experts"
            )


FIELDS: dict[str, tuple[torch.dtype, ...]] = {
    "token_ids": (torch.int32,),
    "phase": (torch.uint8,),
    "expert_ids": (torch.int16,),
    "gate_weights": (torch.float32,),
    "router_logits": (torch.float32,),
    "hidden": (torch.float16, torch.bfloat16, torch.float32),
}
REQUIRED_FIELDS = ("token_ids", "phase", "expert_ids")


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a floating-point tensor is NaN or Inf."""
    # A sum carries NaN and Inf along, and costs a fifth of an elementwise test; it may also overflow by
    # itself, so only its good news is final.
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(torch.isfinite(tensor).all())


def field_shape(name: str, topology: Topology) -> tuple[int, ...]:
    """Shape of one token's entry in a field."""
    return {
        "token_ids": (),
        "phase": (),
        "expert_ids": (topology.layers, topology.top_k),
        "gate_weights": (topology.layers, topology.top_k),
        "router_logits": (topology.layers, topology.router_classes),
        "hidden": (topology.layers, topology.hidden_size),
    }[name]
