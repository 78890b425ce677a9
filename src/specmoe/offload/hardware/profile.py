"""A hardware profile: the links that experts travel over, and the device that computes with them.

A profile is data. Ready ones lie in ``profiles/`` with the source of every figure; ``specmoe hardware measure`` makes
one of the machine at hand. All sizes are bytes, all times seconds, all rates per second, with powers of ten.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from specmoe.errors import SpecmoeError, unknown_name
from specmoe.files import read_json, write_json
from specmoe.schema import FileModel
from specmoe.topology import Topology

__all__ = ["Compute", "Hardware", "Link", "ModelCost", "is_profile", "load_hardware", "ready_hardware"]

_FORMAT, _VERSION = "specmoe-hardware", 1


# Whatever is divided by a rate then stays a number, with room for what no machine has.
_Rate = Annotated[float, Field(ge=1e-6, le=1e24)]
_Seconds = Annotated[float, Field(ge=0, le=1e6)]


class Link(FileModel):
    """What lies between two tiers of storage.

    A transfer holds one of ``parallelism`` slots for its fixed cost; then its bytes pass the bus, one transfer after
    the other. So alone a transfer of n bytes takes ``latency + n / bandwidth``, and many at once reach ``bandwidth``.

    Attributes:
        name: what it is. bandwidth: bytes per second of the bus. latency: fixed cost of one transfer in seconds.
        parallelism: transfers whose fixed costs overlap. queue_depth: prefetches that may wait for a slot; how many is
            the engine's choice. source: where the figures are from.
    """

    name: str
    bandwidth: _Rate
    latency: _Seconds
    parallelism: int = Field(default=1, ge=1, le=4096)
    queue_depth: int = Field(default=64, ge=1, le=1 << 20)
    source: str = ""

    def seconds(self, size: float) -> float:
        """Time of one transfer of ``size`` bytes when nothing else is under way."""
        return self.latency + size / self.bandwidth

    def least_seconds(self, size: float, transfers: int = 1) -> float:
        """Time that some of many transfers take at least, ``size`` bytes together: the bus or the slots are full."""
        passing = size / self.bandwidth
        return max(passing, (transfers * self.latency + passing) / self.parallelism)


class ModelCost(FileModel):
    """What one model's parts cost on a device, measured; times in seconds.

    Attributes:
        model_id: name of the model. layers, experts, top_k, hidden_size: its shape, by which it is known again.
        expert_bytes: one expert's weights as the device held them.
        layer_seconds: the part of one MoE layer without its experts, for a step of one token.
        token_layer_seconds: the same for each further token of the step.
        expert_seconds: one expert for one token. token_seconds: the same expert for each further token.
        other_seconds: of a step, outside the MoE layers.
    """

    model_id: str
    layers: int = Field(ge=1)
    experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    expert_bytes: int = Field(ge=1)
    layer_seconds: _Seconds
    token_layer_seconds: _Seconds
    expert_seconds: float = Field(gt=0, le=1e6)
    token_seconds: _Seconds
    other_seconds: _Seconds

    def is_of(self, topology: Topology) -> bool:
        """Whether ``topology`` has this model's shape; a hidden size of 0 is unknown and agrees with any."""
        return (
            (self.layers, self.experts, self.top_k) == (topology.layers, topology.experts, topology.top_k)
        ) and topology.hidden_size in {0, self.hidden_size}


class Compute(FileModel):
    """How fast the device computes.

    Attributes:
        memory_bandwidth: bytes of weights read per second. flops: floating-point operations per second.
        kernel_seconds: fixed cost of starting one layer. models: models that were measured on the device; for these
            the measured times count, for others the two rates. source: where the figures are from.
    """

    memory_bandwidth: _Rate
    flops: _Rate
    kernel_seconds: _Seconds = 0.0
    models: tuple[ModelCost, ...] = ()
    source: str = ""


class Hardware(FileModel):
    """A machine for offloaded inference.

    Attributes:
        name, description: for people. source: in short where the figures are from; each link and the compute part have
            their own in full.
        links: from the lowest tier up. One link is two tiers (store and device), two are three (disk, host, device).
        compute: the device. memory_bytes: the device's memory, host_bytes: of the tier below it, where known.
        measured: raw points of a measurement, None for a ready profile.
    """

    format: Literal["specmoe-hardware"] = _FORMAT
    version: Literal[1] = _VERSION
    name: str
    description: str
    source: str = Field(min_length=1)
    links: tuple[Link, ...] = Field(min_length=1, max_length=2)
    compute: Compute
    memory_bytes: int | None = Field(default=None, ge=1)
    host_bytes: int | None = Field(default=None, ge=1)
    measured: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _host_is_a_tier(self) -> Hardware:
        if len(self.links) == 2 and self.links[0].name == self.links[1].name:
            raise ValueError(f"both links are named {self.links[0].name!r}")
        return self

    def save(self, path: Path) -> None:
        """Write the profile as JSON, atomically.

        Raises:
            SpecmoeError: the place cannot be written to.
        """
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Hardware:
        """Read a profile.

        Raises:
            SpecmoeError: there is no such file, or it is no profile, or one of another version.
        """
        content = read_json(path)
        again = "measure again with: specmoe hardware measure --out FILE"
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise SpecmoeError(f"{path} is not a hardware profile (its format is not {_FORMAT!r}); {again}")
        if content.get("version") != _VERSION:
            raise SpecmoeError(
                f"{path} is a hardware profile of version {content.get('version')!r}, "
                f"this release reads {_VERSION}; {again}"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the whole"
            raise SpecmoeError(f"{path} is damaged: {place}: {first['msg']}; put it right, or {again}") from error


def is_profile(path: Path) -> bool:
    """Whether a file is a profile, of whatever version; never an error."""
    try:
        content = read_json(path)
    except SpecmoeError:
        return False
    return isinstance(content, dict) and content.get("format") == _FORMAT


def ready_hardware() -> dict[str, Path]:
    """File of each ready profile, by name."""
    folder = Path(str(files("specmoe"))) / "offload" / "hardware" / "profiles"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def load_hardware(name_or_path: str | Path) -> Hardware:
    """A ready profile by name (``rtx-4090``), or one from a file.

    What has a separator or ends in ``.json`` is a path, and so is anything else that is the name of a file here and
    of no ready profile.

    Raises:
        SpecmoeError: no such profile (with the nearest names), or a file that is none.
    """
    text, ready = str(name_or_path), ready_hardware()
    if text in ready:
        return Hardware.load(ready[text])
    path = Path(text).expanduser()
    if isinstance(name_or_path, Path) or path.suffix == ".json" or len(path.parts) > 1 or path.is_file():
        if path.is_dir():
            raise SpecmoeError(f"{path} is a folder; name a hardware profile's file, or one of specmoe hardware list")
        return Hardware.load(path)
    raise unknown_name("hardware profile", text, ready)
