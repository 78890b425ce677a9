"""What a loaded model is: its shape, its routers' weights, and hashes that tell it from others."""

from __future__ import annotations

import hashlib
import re
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from specmoe.errors import SpecmoeError
from specmoe.files import impostor, sha256_file
from specmoe.sources.families import NOT_TEXT, Family, RouterSite, router_sites
from specmoe.sources.recording import ForwardRoutes, LayerRoute, recorded_routes, run_model
from specmoe.topology import Topology

__all__ = ["layer_order", "linear_routers", "tokenizer_hash", "topology_of_model", "unembedding", "weights_hash"]

# Bytes in float16; a vocabulary of 128 thousand at a width of 2,048.
_LARGEST_UNEMBEDDING = 512 << 20

# Bytes of one number in a safetensors header's notation; of integers, how many numbers they hold is not known.
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_INTEGERS = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
# The experts of one layer among a checkpoint's tensors; shared experts have another name.
_EXPERTS = re.compile(r"(.*\.)experts\.")


def topology_of_model(model: Any, family: Family, stack: str, directory: Path | None) -> Topology:
    """Shapes as a run of two tokens shows them, so that no config field has to be known by name.

    Args:
        model: on its device. family, stack: where to look. directory: of the checkpoint, None if it is not local.

    Raises:
        SpecmoeError: layers have different numbers of experts.
    """
    sites, layers = router_sites(model, family, stack), _probe(model, family, stack, [0, 0]).layers
    classes = layers[0].logits.shape[-1]
    experts = min(_experts_with_weights(sites[0].experts) or classes, classes)
    counts = [layer.logits.shape[-1] for layer in layers]
    if len(set(counts)) > 1:
        raise SpecmoeError(
            f"the layers of this {family.name} model have different numbers of experts ({min(counts)} to "
            f"{max(counts)}: a pruned model?), which cannot be captured; record it with its engine and import that, "
            "with --experts"
        )
    numbers, dtype = _numbers_of_the_experts(sites[0], experts), getattr(model.config, "dtype", None)
    stored = _stored_bytes_of_the_experts(directory, numbers) if directory is not None else None
    if stored is None:
        stored = [numbers * (dtype.itemsize if isinstance(dtype, torch.dtype) else 4)]
    if len(stored) not in {1, len(layers)}:
        # Of more layers or fewer than run here, such as those that foresee further tokens: which is which is not known.
        stored = []
    sizes = [max(1, size // experts) for size in stored]
    return Topology(
        model_id="",
        layers=len(layers),
        experts=experts,
        top_k=layers[0].ids.shape[-1],
        hidden_size=layers[0].hidden.shape[-1],
        zero_experts=classes - experts,
        bytes_per_expert=sizes[0] if len(sizes) == 1 else None,
        bytes_per_expert_by_layer=tuple(sizes) if len(sizes) > 1 else None,
    )


def layer_order(model: Any, family: Family, stack: str) -> tuple[int, ...]:
    """Numbers of the MoE layers in the order in which they run: 0, 1, 2 and so on, but for a looped transformer."""
    return _probe(model, family, stack, [0, 0]).order


def _probe(model: Any, family: Family, stack: str, ids: list[int]) -> ForwardRoutes:
    with torch.inference_mode(), recorded_routes(model, family, stack) as recorder:
        run_model(model, family, [ids])
    return recorder.take()[0]


def _experts_with_weights(experts: nn.Module) -> int | None:
    """Experts that have weights: the shortest stack of matrices, or the members of a container."""
    stacked = [parameter.shape[0] for parameter in experts.parameters(recurse=False) if parameter.ndim == 3]
    if stacked:
        return min(stacked)
    return len(experts) if isinstance(experts, nn.ModuleList | nn.ModuleDict) else None


def _numbers_of_the_experts(site: RouterSite, experts: int) -> int:
    """Parameters of a layer's experts, without router, shared experts and what all experts share."""
    part = getattr(site.block, "experts", site.experts)
    router = {id(parameter) for parameter in site.router.parameters()}
    least = 1 if isinstance(part, nn.ModuleList | nn.ModuleDict) else 2
    return sum(
        # Zero experts may have rows in one of the stacks.
        parameter.numel() * experts // (parameter.shape[0] if parameter.ndim == 3 else experts)
        for parameter in part.parameters()
        if id(parameter) not in router and parameter.ndim >= least
    )


def linear_routers(model: Any, family: Family, stack: str) -> tuple[Tensor, Tensor | None] | None:
    """The routers as linear maps, weights [L, E, D] and biases [L, E], None where they are something else.

    Whether a router is linear is tried: the map must give the logits that the router gives.
    """
    sites, forward = router_sites(model, family, stack), _probe(model, family, stack, list(range(8)))
    maps = [_linear_map(sites[number], layer) for number, layer in zip(forward.order, forward.layers, strict=True)]
    found = [each for each in maps if each is not None]
    if len(found) < len(maps):
        return None
    biases = [bias for _, bias in found if bias is not None]
    return torch.stack([weight.cpu() for weight, _ in found]), (
        torch.stack([bias.cpu() for bias in biases]) if len(biases) == len(found) else None
    )


def unembedding(model: Any, hidden_size: int) -> Tensor | None:
    """The output embedding [V, D] of a model, which reads the next token off its last hidden state.

    None where there is none, it is not as wide as the routers' input, or it is too large to keep beside a trace.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != hidden_size:
        return None
    if not weight.is_floating_point() or 2 * weight.numel() > _LARGEST_UNEMBEDDING:
        return None
    return weight.detach()


def _linear_map(site: RouterSite, layer: LayerRoute) -> tuple[Tensor, Tensor | None] | None:
    named = dict(site.router.named_parameters())
    classes, width = layer.logits.shape[-1], layer.hidden.shape[-1]
    hidden, logits = layer.hidden.float(), layer.logits.float()
    for name, weight in named.items():
        if not name.endswith("weight") or weight.ndim != 2 or weight.shape[1] != width or len(weight) < classes:
            continue
        bias = named.get(name.removesuffix("weight") + "bias")
        with torch.inference_mode():
            # Rows beyond the classes weigh shared experts.
            rows, offset = weight[:classes].float(), None if bias is None else bias[:classes].float()
            again = F.linear(hidden, rows, offset)
            factor = float((again * logits).sum() / (again * again).sum().clamp_min(1e-30))
        # Some routers multiply what the map gives; a factor within rounding of 1 is none.
        factor = 1.0 if abs(factor - 1) < 1e-2 else factor
        # The router may compute in the model's half precision.
        tolerance = 8 * torch.finfo(weight.dtype).eps * float(logits.abs().max().clamp_min(1.0))
        if float((again * factor - logits).abs().max()) <= tolerance:
            return rows.detach() * factor, None if offset is None else offset.detach() * factor
    return None


def _stored_bytes_of_the_experts(directory: Path, numbers: int) -> list[int] | None:
    """Bytes of each layer's experts as the checkpoint stores them, one number if all are alike.

    None if no safetensors file tells. Only headers are read. Most of a layer's bytes being floats, they are
    ``numbers`` of them; being integers that several numbers are packed into, whatever is stored with them counts, such
    as the scales of MXFP4.
    """
    layers: dict[str, dict[str, int]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    found = _EXPERTS.match(name)
                    if found is None or NOT_TEXT & set(name.split(".")):
                        continue
                    stored = file.get_slice(name)
                    dtype = stored.get_dtype()
                    of_layer = layers.setdefault(found[1], {})
                    item_bytes = _FLOATS.get(dtype) or _INTEGERS.get(dtype, 1)
                    of_layer[dtype] = of_layer.get(dtype, 0) + prod(stored.get_shape()) * item_bytes
        except (SafetensorError, OSError) as error:
            raise SpecmoeError(f"{path} {impostor(path) or f'cannot be read: {error}'}") from error
    if not layers:
        return None
    found = []
    for name in sorted(layers, key=_by_number):
        by_dtype = layers[name]
        most = max(by_dtype, key=lambda dtype: by_dtype[dtype])
        found.append(numbers * _FLOATS[most] if most in _FLOATS else sum(by_dtype.values()))
    return found[:1] if len(set(found)) == 1 else found


def _by_number(name: str) -> list[tuple[int, str]]:
    """For sorting: layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


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
