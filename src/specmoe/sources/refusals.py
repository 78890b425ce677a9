"""Why a checkpoint cannot be captured: one line each for what people meet most often."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from specmoe.errors import SpecmoeError
from specmoe.files import impostor
from specmoe.sources.families import FAMILIES

__all__ = ["not_loaded", "other_shapes", "refuse_without_experts"]

_EXAMPLES = "OLMoE, Mixtral, Qwen3-MoE, DeepSeek-V3 or gpt-oss (specmoe families lists all)"
# A field of a configuration that only a model with experts has.
_OF_EXPERTS = re.compile(r"expert|(^|_)moe(_|$)")
_COUNT = re.compile(r"(num|n)_(local_|routed_|moe_)?experts|moe_num_experts")
_LAYER = re.compile(r"\.(?:layers?|blocks?|h)\.(\d+)\.")
_TOKENIZER_FILE = re.compile(r"(config|.*token.*|vocab)\.json|.*\.model|merges\.txt|.*\.jinja")
_MODEL_FILE = re.compile(r"config\.json|.*\.index\.json|.*\.safetensors|.*\.bin")

# A tensor's name, its shape in the checkpoint, its shape by the configuration.
Mismatch = tuple[str, Iterable[int], Iterable[int]]


def refuse_without_experts(model: str, config: dict[str, Any]) -> None:
    """Refuse what cannot be captured whatever its family turns out to be.

    Args:
        model: its name. config: content of its ``config.json``.

    Raises:
        SpecmoeError: it needs code of its own, is dense, or gives each layer its own number of experts.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = config["model_type"]
    if config.get("auto_map") and model_type not in CONFIG_MAPPING_NAMES:
        raise SpecmoeError(
            f"{model} ({model_type}) needs code of its own (auto_map in its config.json), and no code of a checkpoint "
            f"is ever run; take a version of it for transformers itself, or a model such as {_EXAMPLES}"
        )
    if _is_dense(config):
        raise SpecmoeError(
            f"{model} ({model_type}) is a dense model: it has no experts to route; "
            f"take a Mixture-of-Experts model such as {_EXAMPLES}"
        )
    for name, value in _fields(config):
        if _COUNT.fullmatch(name) and isinstance(value, list) and len(set(map(str, value))) > 1:
            raise SpecmoeError(
                f"{model} is a pruned model: its config.json gives each layer a number of experts ({name} "
                f"{_short(value)}), transformers builds all layers alike; import a trace of the engine that runs it"
            )


def _is_dense(config: dict[str, Any]) -> bool:
    """Whether nothing in a configuration speaks of experts, what its class has by default included."""
    from transformers import AutoConfig

    try:
        fields = list(_fields(AutoConfig.for_model(**config).to_dict()))
    except Exception:  # An unknown type, or a wrong value: said when it is loaded.
        return False
    # A family's row is proof enough.
    types = {re.sub(r"_text$", "", value) for name, value in fields if name == "model_type" and isinstance(value, str)}
    return not types & FAMILIES.keys() and not any(
        _OF_EXPERTS.search(name) and _says_experts(value) for name, value in fields
    )


def _fields(config: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        yield str(name), value
        if isinstance(value, dict):
            yield from _fields(value)


def _says_experts(value: Any) -> bool:
    # Zero, none or one expert is how families with dense members say that this is one.
    return value > 1 if isinstance(value, int | float) and not isinstance(value, bool) else bool(value)


def _short(values: list[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:4])
    return f"{shown}, ..." if len(values) > 4 else shown


def other_shapes(model: str, mismatches: Iterable[Mismatch]) -> SpecmoeError | None:
    """The error for tensors whose shapes are not those of the configuration, None if there are none.

    Args:
        mismatches: as transformers reports them.
    """
    found = sorted((name, tuple(stored), tuple(wanted)) for name, stored, wanted in mismatches)
    if not found:
        return None
    counts: dict[int, tuple[int, int]] = {}
    for name, stored, wanted in found:
        layer = _LAYER.search(f".{name}")
        # Experts and routers have one row an expert; where only that differs, experts were taken out.
        if layer and stored[1:] == wanted[1:] and re.search(r"\bexperts\b|\.(gate|router)\b", name):
            counts[int(layer[1])] = (stored[0], wanted[0])
        else:
            return SpecmoeError(
                f"cannot load {model}: {name} has shape {list(stored)} in the checkpoint and {list(wanted)} by its "
                f"config.json ({len(found)} such tensors); weights and config.json belong to different models"
            )
    first = min(counts)
    stored, wanted = counts[first]
    others = sorted(set(counts) - {first})
    also = f", and layers {_short(others)} differ too" if others else ""
    return SpecmoeError(
        f"cannot load {model}: its layer {first} has {stored} experts in the checkpoint, config.json says {wanted}"
        f"{also}; if it was pruned alike everywhere, put the number right in config.json; if layers differ, "
        "transformers, which builds all alike, cannot run it: import a trace of the engine that does"
    )


def not_loaded(part: str, model: str, local: bool, error: Exception) -> SpecmoeError:
    """The error for whatever transformers raised: the first line of what it said, unless the files tell more.

    Args:
        part: ``the tokenizer of``, or empty for the model. model: its name. local: whether it is a directory.
    """
    subject = f"{part} {model}".strip()
    for path in sorted(Path(model).iterdir()) if local else []:
        is_read = _TOKENIZER_FILE.fullmatch(path.name) if part else _MODEL_FILE.fullmatch(path.name)
        if is_read and (found := impostor(path)) is not None:
            return SpecmoeError(f"{path} {found}")
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    if "trust_remote_code" in text:
        reason = "it needs code of its own, and no code of a checkpoint is ever run"
    elif "automatic conversion of the weights" in text:
        reason = "experts lack some of their weights, or differ in shape; get the model again"
    if local or "code of its own" in reason:
        return SpecmoeError(f"cannot load {subject}: {reason}")
    return SpecmoeError(f"cannot get {subject} from the hub; check name and network, or give a directory ({reason})")
