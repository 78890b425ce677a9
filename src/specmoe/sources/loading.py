"""Loading a Hugging Face model for capture: what it is, what it weighs, and how it runs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from specmoe.errors import SpecmoeError, unknown_name
from specmoe.files import sha256_file
from specmoe.sources.families import Family, family_of, router_sites
from specmoe.sources.recording import recorded_routes, run_model
from specmoe.topology import Topology

__all__ = ["DTYPES", "LoadedModel", "load_model", "untrained_like"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Bytes of one number in a safetensors header's notation.
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be captured.

    Attributes:
        model: in evaluation mode. tokenizer: its tokenizer. family: how it routes.
        topology: of the stack that is captured by default. stack: name of that stack.
        tokenizer_id: short content hash of the tokenizer.
        settings: how the model runs, for the trace's manifest: routes depend on it.
    """

    model: Any
    tokenizer: Any
    family: Family
    topology: Topology
    stack: str
    tokenizer_id: str
    settings: dict[str, Any]


def load_model(
    model: str | Path, *, dtype: str = "float32", device: str = "cpu", stack: str | None = None
) -> LoadedModel:
    """Load a model and its tokenizer from a local directory or from the hub.

    A local directory never touches the network, and no code of a checkpoint is ever run.

    Args:
        model: directory, or hub id such as ``allenai/OLMoE-1B-7B-0924``.
        dtype: one of :data:`DTYPES`, what the model computes in. device: a torch device.
        stack: the stack whose shape the topology describes; None for the family's first.

    Raises:
        SpecmoeError: nothing is there, it is no model, its family is not supported, weights are missing or
            damaged, or the hub cannot be reached.
    """
    return _load(str(model), dtype, device, stack, seed=None)


def untrained_like(
    model: str | Path, seed: int = 0, *, dtype: str = "float32", device: str = "cpu", stack: str | None = None
) -> LoadedModel:
    """The same configuration with random weights: a control that shows what training put into the routing.

    Raises:
        SpecmoeError: as :func:`load_model`.
    """
    return _load(str(model), dtype, device, stack, seed=seed)


def _load(model: str, dtype: str, device: str, stack: str | None, seed: int | None) -> LoadedModel:
    import transformers

    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    local = _is_local(model)
    source: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    with _quiet():
        family = family_of(_model_type(model, local))
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model, **source)
        except Exception as error:
            raise _cannot_load("the tokenizer of", model, local, error) from error
        # Where the files are missing, transformers makes an empty tokenizer that knows no word.
        if len(set(tokenizer("Six words become different token ids", add_special_tokens=False)["input_ids"])) < 5:
            raise SpecmoeError(f"{model} has no tokenizer, or one without a vocabulary; put tokenizer.json there")
        model_class = getattr(transformers, family.model_class)
        try:
            if seed is None:
                live, info = model_class.from_pretrained(model, dtype=DTYPES[dtype], output_loading_info=True, **source)
                missing = sorted(info["missing_keys"])
            else:
                config = transformers.AutoConfig.from_pretrained(model, **source)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    live = model_class(config)
                missing = []
            # transformers fills weights that a checkpoint lacks at random and only warns about it.
            if missing:
                raise SpecmoeError(
                    f"{model} lacks {len(missing)} weights, {missing[0]} among them; get the model again"
                )
            live = live.to(device=device, dtype=DTYPES[dtype]).eval()
        except SpecmoeError:
            raise
        except Exception as error:
            raise _cannot_load("", model, local, error) from error
    stack = stack or next(iter(family.stacks))
    topology = _topology(live, family, stack, Path(model) if local else None)
    name = Path(model).resolve().name if local else model
    revision = _weights_hash(Path(model)) if local else str(getattr(live.config, "_commit_hash", None) or "")
    if seed is not None:
        name, revision = f"{name}-untrained", f"seed-{seed}"
    return LoadedModel(
        model=live,
        tokenizer=tokenizer,
        family=family,
        topology=topology.model_copy(update={"model_id": name, "revision": revision}),
        stack=stack,
        tokenizer_id=_tokenizer_hash(tokenizer),
        settings={
            "dtype": dtype,
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
            "attention": str(getattr(live.config, "_attn_implementation", None)),
            "experts": str(getattr(live.config, "_experts_implementation", None)),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "stack": stack,
            "untrained_seed": seed,
        },
    )


def _is_local(model: str) -> bool:
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise SpecmoeError(f"{model} is not a model directory: it has no config.json")
        return True
    if path.exists() or model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise SpecmoeError(f"model {model} is not a directory; name a directory with a config.json, or a hub id")
    return False


def _model_type(model: str, local: bool) -> str:
    """``model_type`` as the config file has it, read without knowing the type."""
    from transformers import PretrainedConfig

    try:
        content, _ = PretrainedConfig.get_config_dict(model, local_files_only=local)
    except Exception as error:
        raise _cannot_load("", model, local, error) from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(model_type, str):
        raise SpecmoeError(f"{model} is not a model: its config.json names no model_type")
    return model_type


def _cannot_load(part: str, model: str, local: bool, error: Exception) -> SpecmoeError:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    subject = f"{part} {model}".strip()
    if local:
        return SpecmoeError(f"cannot load {subject}: {reason}")
    return SpecmoeError(f"cannot get {subject} from the hub; check name and network, or give a directory ({reason})")


def _topology(model: Any, family: Family, stack: str, directory: Path | None) -> Topology:
    """Shapes as a one-token run shows them, so that no config field has to be known by name."""
    sites = router_sites(model, family, stack)
    with torch.inference_mode(), recorded_routes(model, family, stack) as recorder:
        run_model(model, family, [[0, 0]])
    layer = recorder.take()[0].layers[0]
    experts = layer.logits.shape[-1]
    numbers = sum(parameter.numel() for parameter in sites[0].experts.parameters()) // experts
    item_bytes = _stored_item_bytes(directory) if directory is not None else None
    if item_bytes is None:
        stored = getattr(model.config, "dtype", None)
        item_bytes = stored.itemsize if isinstance(stored, torch.dtype) else 4
    return Topology(
        model_id="",
        layers=len(sites),
        experts=experts,
        top_k=layer.ids.shape[-1],
        hidden_size=layer.hidden.shape[-1],
        bytes_per_expert=numbers * item_bytes,
    )


def _stored_item_bytes(directory: Path) -> int | None:
    """Bytes of one number of an expert as the checkpoint stores it; None if it has no safetensors."""
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if "expert" in name:
                        return _ITEM_BYTES.get(file.get_slice(name).get_dtype())
        except (SafetensorError, OSError) as error:
            raise SpecmoeError(f"{path} cannot be read: {error}") from error
    return None


def _weights_hash(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")]):
        digest.update(f"{path.name}\0{sha256_file(path)}\0".encode())
    return digest.hexdigest()[:16]


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and notes off the terminal; problems come as exceptions."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
