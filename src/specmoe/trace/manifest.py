"""What a trace says about itself: ``manifest.json`` and the document table of each shard."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specmoe.errors import SpecmoeError
from specmoe.files import read_json, write_json
from specmoe.topology import Topology

__all__ = ["MANIFEST_NAME", "ROUTERS_NAME", "VERSION", "DocumentRecord", "Manifest", "ShardRecord", "Source", "Timing"]

MANIFEST_NAME = "manifest.json"
ROUTERS_NAME = "routers.safetensors"
VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Source(_Strict):
    """Where the routing comes from, and how the model was run: routes depend on it.

    Attributes:
        kind: ``"capture"``, ``"synthetic"``, or the name of an importer.
        tokenizer: name or content hash; token ids of different tokenizers do not compare.
        text_sha256: hash of the names and texts that were read.
        settings: dtype, implementation, library versions, prompts' length and the like.
    """

    kind: str
    tokenizer: str = ""
    text_sha256: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)


class Timing(_Strict):
    """What one MoE layer costs the model itself, a token at a time, on the machine that captured.

    Attributes:
        layer_us_p50: median time of one decoder layer at batch 1, in µs. machine: where that was.
    """

    layer_us_p50: float = Field(gt=0)
    machine: str


class DocumentRecord(_Strict):
    """One document of a shard.

    Attributes:
        doc_id, domain: as the source names them. text_sha256: of the text; equal texts are duplicates.
        group: documents of one group stay on one side of a split, such as the turns of a chat; empty for none.
        start, tokens: its rows in the shard. hidden_start: its first row in ``hidden``, None if not kept.
        crc32: checksum of each field's bytes, verified whenever the document is read.
    """

    doc_id: str
    domain: str
    text_sha256: str
    group: str = ""
    start: int = Field(ge=0)
    tokens: int = Field(ge=0)
    hidden_start: int | None = Field(default=None, ge=0)
    crc32: dict[str, int]


class ShardRecord(_Strict):
    """One shard file: its size in rows and bytes, and the SHA-256 of its header.

    The header holds a checksum of every document's every field, so its hash stands for the whole content. It is
    verified whenever the trace is opened, the documents as they are read.
    """

    file: str = Field(pattern=r"^shard-\d{5}\.safetensors$")
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Strict):
    """The content of ``manifest.json``.

    Attributes:
        fields: the fields kept; ``hidden`` may be kept for some documents only.
        complete: False while a writer has more to add.
        split_keys: what documents may be split by, and what must stay on one side.
        routers_sha256: of the file with the routers' own weights; None if they are not kept.
    """

    format: Literal["specmoe-trace"] = "specmoe-trace"
    version: Literal[1] = VERSION
    topology: Topology
    source: Source
    fields: tuple[str, ...]
    split_keys: tuple[str, ...] = ("doc_id", "text_sha256", "group", "domain")
    timing: Timing | None = None
    complete: bool = False
    shards: tuple[ShardRecord, ...] = ()
    routers_sha256: str | None = None

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read ``directory/manifest.json``.

        Raises:
            SpecmoeError: missing, damaged, of another version, or not a trace at all.
        """
        path = directory / MANIFEST_NAME
        if not path.exists():
            raise SpecmoeError(
                f"{directory} is not a trace (it has no {MANIFEST_NAME}); make one with: specmoe collect"
            )
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != "specmoe-trace":
            raise SpecmoeError(f"{path} does not describe a specmoe trace")
        if content.get("version") != VERSION:
            raise SpecmoeError(
                f"{path} has trace version {content.get('version')!r}, this specmoe reads version {VERSION}; "
                "capture again"
            )
        if content.pop("sha256", None) != _digest(content):
            raise SpecmoeError(f"{path} was changed after it was written (its checksum is wrong); capture again")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise SpecmoeError(f"{path} is damaged at {place}: {first['msg']}") from error

    def save(self, directory: Path) -> None:
        """Write ``directory/manifest.json`` atomically, with a checksum of its content."""
        content = self.model_dump(mode="json")
        write_json(directory / MANIFEST_NAME, {**content, "sha256": _digest(content)})


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, whatever its layout as text."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def encode_documents(documents: list[DocumentRecord]) -> str:
    """The document table as it stands in a shard's header."""
    return json.dumps([document.model_dump(mode="json") for document in documents])


def decode_documents(text: str) -> list[DocumentRecord]:
    """Inverse of :func:`encode_documents`.

    Raises:
        ValueError: the text is not such a table.
    """
    return [DocumentRecord.model_validate(entry) for entry in json.loads(text)]
