"""Families of transformers that have no row: captured as most families route, if a replay shows that they do.

A newer transformers brings families that nobody has looked at. Most share the common seam (see
:mod:`specmoe.sources.families`). Whether one does is tried on the first document: every router is called once more with
what was recorded as its input, and must give the recorded logits, ids and weights bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specmoe.errors import SpecmoeError
from specmoe.sources.families import Family, RouterSite, not_certain, router_sites
from specmoe.sources.loading import LoadedModel
from specmoe.sources.recording import LayerRoute, recorded_routes, run_model

__all__ = ["checked_by_replay"]

_Call = tuple[RouterSite, tuple[Any, ...], dict[str, Any]]


def checked_by_replay(loaded: LoadedModel, ids: Sequence[int] | np.ndarray) -> LoadedModel:
    """The same model, with what the replay showed in its settings: ``choice_is_top_k``.

    Args:
        loaded: of a family without a row. ids: token ids of a document.

    Raises:
        SpecmoeError: the routes cannot be told for certain; the reason is given.
    """
    calls: list[_Call] = []

    def keep(site: RouterSite) -> Callable[..., None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.append((site, arguments, named))

        return hook

    handles = [
        site.router.register_forward_pre_hook(keep(site), with_kwargs=True)
        for site in router_sites(loaded.model, loaded.family, loaded.stack)
    ]
    try:
        with torch.inference_mode(), recorded_routes(loaded.model, loaded.family, loaded.stack) as recorder:
            run_model(loaded.model, loaded.family, [ids])
            (forward,) = recorder.take()
            made = list(calls)  # replaying calls the hooks again
            for call, route in zip(made, forward.layers, strict=True):
                _check(call, route, loaded.family)
    except SpecmoeError as error:
        raise not_certain(loaded.family, str(error)) from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise not_certain(loaded.family, f"its blocks are called in a way of their own ({reason})") from error
    finally:
        for handle in handles:
            handle.remove()
    top_k = all(_is_top_k(route) for route in forward.layers)
    return replace(loaded, settings=loaded.settings | {"choice_is_top_k": top_k})


def _check(call: _Call, route: LayerRoute, family: Family) -> None:
    site, arguments, named = call
    (given, *others), named = _split(arguments, named)
    output = site.router(route.hidden.view(given.shape), *others, **named)
    logits = family.read_logits(output)
    logits = logits.flatten(0, -2)
    if not torch.equal(logits, route.logits):
        raise SpecmoeError(f"the router of MoE layer {site.layer} gives other logits when it is called again")
    ids, classes = route.ids, logits.shape[-1]
    if ids.is_floating_point() or ids.ndim != 2 or int(ids.min()) < 0:
        raise SpecmoeError(f"the experts of MoE layer {site.layer} are not called with expert ids")
    if not logits.is_floating_point() or classes <= ids.shape[-1] or int(ids.max()) >= classes:
        raise SpecmoeError(f"the first output of the router of MoE layer {site.layer} does not rank the experts")
    if bool((logits >= 0).all()):
        raise SpecmoeError(f"the router of MoE layer {site.layer} returns scores, not logits")
    if bool((route.weights == 0).any()):
        raise SpecmoeError(f"experts of MoE layer {site.layer} are called with weight 0, which may mean not at all")
    answers = output if isinstance(output, tuple) else (output,)
    choose: Any = getattr(site.block, "route_tokens_to_experts", None)
    if len(answers) == 1 and choose is not None:
        answers = (*answers, *choose(output))
    found = [answer.flatten(0, -2) for answer in answers if isinstance(answer, Tensor) and answer.ndim > 1]
    for name, executed in (("ids", route.ids), ("weights", route.weights)):
        if not any(answer.dtype == executed.dtype and torch.equal(answer, executed) for answer in found):
            raise SpecmoeError(f"the experts of MoE layer {site.layer} are called with other {name} than its router's")


def _split(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if arguments:
        return arguments, named
    return (named["hidden_states"],), {name: value for name, value in named.items() if name != "hidden_states"}


def _is_top_k(route: LayerRoute) -> bool:
    """Whether the ids are those of the largest logits; equal logits count as either."""
    least = route.logits.gather(-1, route.ids).min(-1).values
    return bool((route.logits.topk(route.ids.shape[-1], -1).values[:, -1] <= least).all())
