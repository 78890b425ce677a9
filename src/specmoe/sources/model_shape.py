"""What a loaded model is: its shape, its routers' weights, and hashes that tell it from others."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from specmoe.errors import SpecmoeError
from specmoe.files import sha256_file
from specmoe.sources.families import Family, RouterSite, router_sites
from specmoe.sources.recording import LayerRoute, recorded_routes, run_model
from specmoe.topology import Topology

__all__ = ["linear_routers", "tokenizer_hash", "topology_of_model", "weights_hash"]

# Bytes of one number in a safetensors header's notation.
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


def topology_of_model(model: Any, family: Family, stack: str, directory: Path | None) -> Topology:
    """Shapes as a run of two tokens shows them, so that no config field has to be known by name.

    Args:
        model: on its device. family, stack: where to look. directory: of the checkpoint, None if it is not local.
    """
    sites, layers = router_sites(model, family, stack), _probe(model, family, stack, [0, 0])
    classes = layers[0].logits.shape[-1]
    experts = min(_experts_with_weights(sites[0].experts) or classes, classes)
    numbers = sum(parameter.numel() for parameter in sites[0].experts.parameters()) // experts
    item_bytes = _stored_item_bytes(directory) if directory is not None else None
    if item_bytes is None:
        stored = getattr(model.config, "dtype", None)
        item_bytes = stored.itemsize if isinstance(stored, torch.dtype) else 4
    return Topology(
        model_id="",
        layers=len(sites),
        experts=experts,
        top_k=layers[0].ids.shape[-1],
        hidden_size=layers[0].hidden.shape[-1],
        zero_experts=classes - experts,
        bytes_per_expert=max(1, numbers * item_bytes),
    )


def _probe(model: Any, family: Family, stack: str, ids: list[int]) -> list[LayerRoute]:
    with torch.inference_mode(), recorded_routes(model, family, stack) as recorder:
        run_model(model, family, [ids])
    return recorder.take()[0].layers


def _experts_with_weights(experts: nn.Module) -> int | None:
    """Experts that have weights: the shortest stack of matrices, or the members of a container."""
    stacked = [parameter.shape[0] for parameter in experts.parameters(recurse=False) if parameter.ndim == 3]
    if stacked:
        return min(stacked)
    return len(experts) if isinstance(experts, nn.ModuleList | nn.ModuleDict) else None


def linear_routers(model: Any, family: Family, stack: str) -> tuple[Tensor, Tensor | None] | None:
    """The routers as linear maps, weights [L, E, D] and biases [L, E], None where they are something else.

    Whether a router is linear is tried: the map must give the logits that the router gives.
    """
    maps = [
        _linear_map(site, layer)
        for site, layer in zip(
            router_sites(model, family, stack), _probe(model, family, stack, list(range(8))), strict=True
        )
    ]
    found = [each for each in maps if each is not None]
    if len(found) < len(maps):
        return None
    biases = [bias for _, bias in found if bias is not None]
    return torch.stack([weight.cpu() for weight, _ in found]), (
        torch.stack([bias.cpu() for bias in biases]) if len(biases) == len(found) else None
    )


def _linear_map(site: RouterSite, layer: LayerRoute) -> tuple[Tensor, Tensor | None] | None:
    named = dict(site.router.named_parameters())
    classes, width = layer.logits.shape[-1], layer.hidden.shape[-1]
    hidden, logits = layer.hidden.float(), layer.logits.float()
    for name, weight in named.items():
        if not name.endswith("weight") or weight.shape != (classes, width):
            continue
        bias = named.get(name.removesuffix("weight") + "bias")
        with torch.inference_mode():
            again = F.linear(hidden, weight.float(), None if bias is None else bias.float())
        # The router may compute in the model's half precision.
        tolerance = 8 * torch.finfo(weight.dtype).eps * float(logits.abs().max().clamp_min(1.0))
        if float((again - logits).abs().max()) <= tolerance:
            return weight.detach().float(), None if bias is None else bias.detach().float()
    return None


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


def weights_hash(directory: Path) -> str:
    """Short content hash of a checkpoint's weight files."""
    digest = hashlib.sha256()
    for path in sorted([*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")]):
        digest.update(f"{path.name}\0{sha256_file(path)}\0".encode())
    return digest.hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """Short content hash of a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()[:16]
