"""A blend of trained predictors, itself a predictor, kept in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specmoe.calibration import Calibration
from specmoe.dataset import Window
from specmoe.errors import SpecmoeError
from specmoe.files import atomic_path, regular_file
from specmoe.predictors.base import Observation, Predictor, Recipe, State, parameter_count
from specmoe.predictors.recipes import CHANGEABLE, kind_of, values_of
from specmoe.topology import Topology

__all__ = ["Blend", "SavedBlend", "Seat", "load_blend", "save_blend"]

_FORMAT = "specmoe-blend"
# Why a file of weights cannot be read; each library has its own exceptions.
UNREADABLE = (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Seat:
    """A member's place in a blend.

    Attributes:
        predictor, seed: which run it is. weight_H: its weight at each horizon, on its calibrated log-odds.
    """

    predictor: str
    seed: int
    weight_H: tuple[float, ...]


class Blend(Predictor):
    """Weighted sum of the members' calibrated log-odds (logarithmic opinion pool; Genest and Zidek, 1986).

    Calibrated log-odds are a member's logits times the factor that its calibration has for the source layer and the
    horizon, minus a shift of the event. A shift changes neither the order of the experts nor a probability that is
    worked out from the sum, so it is left out, and one factor for each member, source layer and horizon remains.

    Args:
        members: trained; of one topology and with the same horizons. A member may not be the blend's twice.
        weight_MSH: not negative, calibration factors included.

    Raises:
        SpecmoeError: no member, or members that differ in topology or horizons.
    """

    recipe: ClassVar[Recipe] = Recipe(
        category="ensemble", sees="context", source="logarithmic opinion pool: Genest and Zidek (1986)"
    )
    memory = None

    weight_MSH: Tensor

    def __init__(self, members: Sequence[Predictor], weight_MSH: Tensor) -> None:
        if not members:
            raise SpecmoeError("a blend needs at least one member")
        super().__init__(members[0].topology, members[0].horizons)
        if any((m.topology, m.horizons) != (self.topology, self.horizons) for m in members):
            raise SpecmoeError("the members of a blend must have one topology and the same horizons")
        expected = (len(members), self.topology.layers, len(self.horizons))
        if weight_MSH.shape != expected:
            raise SpecmoeError(f"a blend's weights have shape {list(weight_MSH.shape)}, expected {list(expected)}")
        self.members = nn.ModuleList(members)
        self.register_buffer("weight_MSH", weight_MSH.detach().clone())
        self.eval()

    def _members(self) -> list[Predictor]:
        return [member for member in self.members if isinstance(member, Predictor)]

    def forward(self, window: Window) -> Tensor:
        """Logits [B, T, S, H, E]; one member's at a time, so that no more than two are held."""
        pairs = zip(self._members(), self.weight_MSH, strict=True)
        total: Tensor | None = None
        for member, weight_SH in pairs:
            part = member(window) * weight_SH[..., None]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def start(self) -> State:
        """The states of all members before the first token of a sequence."""
        return State(members=[member.start() for member in self._members()])

    @torch.no_grad()
    def step(self, state: State, observation: Observation) -> Tensor:
        """Logits [H, E] of one event: every member steps."""
        weight_MH1 = self.weight_MSH[:, observation.layer, :, None]
        pairs = zip(self._members(), state.members, strict=True)
        return (torch.stack([member.step(own, observation) for member, own in pairs]) * weight_MH1).sum(0)


@dataclass(frozen=True)
class SavedBlend:
    """A blend as its file has it.

    Attributes:
        blend: ready to predict. seats: who its members are. calibration: how to read its logits.
        facts: what else was kept of its making.
    """

    blend: Blend
    seats: tuple[Seat, ...]
    calibration: Calibration
    facts: dict[str, Any]


def save_blend(
    blend: Blend, seats: Sequence[Seat], calibration: Calibration, path: Path, facts: Mapping[str, Any] | None = None
) -> None:
    """Write members, weights and calibration into one safetensors file, atomically.

    Args:
        seats: one a member, in their order. facts: to be kept beside; anything that JSON holds.

    Raises:
        SpecmoeError: the file cannot be written.
    """
    members = [
        {
            "predictor": seat.predictor,
            "seed": seat.seed,
            "weights": list(seat.weight_H),
            "recipe": values_of(member.recipe) if member.recipe.epochs > 0 else {},
        }
        for seat, member in zip(seats, blend._members(), strict=True)
    ]
    metadata = {
        "format": _FORMAT,
        "topology": blend.topology.model_dump_json(),
        "horizons": json.dumps(blend.horizons),
        "members": json.dumps(members),
        "parameters": str(parameter_count(blend)),
        "calibration": calibration.to_json(),
        "facts": json.dumps(dict(facts or {})),
    }
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in blend.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata=metadata)


def load_blend(path: Path) -> SavedBlend:
    """Build a blend from its file; nothing else is needed.

    Raises:
        SpecmoeError: missing, damaged, or not a blend.
    """
    if not path.exists():
        raise SpecmoeError(f"{path} does not exist")
    regular_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError("it is not a blend")
        topology = Topology.model_validate_json(metadata["topology"])
        horizons = tuple(json.loads(metadata["horizons"]))
        members, seats = [], []
        for each in json.loads(metadata["members"]):
            # A field that later versions no longer know cannot have shaped the module that this version builds.
            recipe = {name: value for name, value in each["recipe"].items() if name in CHANGEABLE}
            members.append(kind_of(each["predictor"], {each["predictor"]: recipe})(topology, horizons))
            seats.append(Seat(each["predictor"], int(each["seed"]), tuple(each["weights"])))
        blend = Blend(members, torch.zeros(len(members), topology.layers, len(horizons)))
        blend.load_state_dict(load_file(str(path)))
        calibration = Calibration.from_json(metadata["calibration"])
        return SavedBlend(blend.eval(), tuple(seats), calibration, json.loads(metadata["facts"]))
    except (*UNREADABLE, SpecmoeError, ValidationError) as error:
        raise SpecmoeError(f"{path} cannot be read ({_first_line(error)}); delete it and make it again") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
