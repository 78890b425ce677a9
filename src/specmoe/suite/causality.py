"""Does a predictor look at what is not yet known? Change all of that, and see whether anything it said moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from specmoe.dataset import Window, routed_of
from specmoe.predictors.base import Predictor

__all__ = ["TOLERANCE", "Event", "future_of", "largest_leak", "probed_events", "stretch_of", "with_other_future"]

# Of a logit, as a share of the largest one (or of 1): sums of another order round differently, a leak moves far more.
TOLERANCE = 1e-4

# A place in execution order: token, source layer.
Event = tuple[int, int]


class Future(NamedTuple):
    """What is not yet known at an event: tokens after it [T], and (token, layer) after it [T, L]. Both bool."""

    tokens_T: Tensor
    places_TL: Tensor


def future_of(event: Event, tokens: int, layers: int) -> Future:
    """What lies after ``event`` (token, layer) in a window of that size."""
    token, layer = event
    place = torch.arange(tokens * layers).view(tokens, layers)
    return Future(torch.arange(tokens) > token, place > token * layers + layer)


def with_other_future(window: Window, other: Window, event: Event) -> Window:
    """``window`` up to and with ``event``, and ``other``, of the same shape, after it.

    Known at (token t, layer s) are the ids of tokens up to t, everything of earlier tokens, and of t the router
    inputs and outputs of layers up to s. All else is taken from ``other``, also which tokens exist.
    """
    tokens, layers = window.router_BTLE.shape[1:3]
    future = future_of(event, tokens, layers)

    def mixed(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
        if ours is None or theirs is None:
            return ours
        mask = future.tokens_T if ours.ndim == 2 else future.places_TL.view(tokens, layers, *[1] * (ours.ndim - 3))
        return torch.where(mask.to(ours.device), theirs, ours)

    names = ("token_ids_BT", "valid_BT", "scored_BT", "phase_BT")
    names += ("expert_ids_BTLK", "routed_BTLE", "router_BTLE", "hidden_BTLD")
    return replace(window, **{name: mixed(getattr(window, name), getattr(other, name)) for name in names})


def other_futures(window: Window, seed: int = 0) -> Iterator[Window]:
    """Two windows of the same shape to take a future from: one with everything drawn anew, one where nothing comes.

    Drawn anew are the token ids (of this window), the experts, the routers' outputs, and the router inputs (of
    other places, with noise as large as themselves).
    """
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, layers, experts = window.router_BTLE.shape
    logits = 3 * torch.randn(batch, tokens, layers, experts, generator=generator)
    ids = logits.topk(window.expert_ids_BTLK.shape[-1], -1).indices
    hidden = window.hidden_BTLD
    if hidden is not None:
        flat = hidden.flatten(0, 2)
        moved = flat[torch.randperm(len(flat), generator=generator)].view(hidden.shape)
        hidden = moved + hidden.std() * torch.randn(hidden.shape, generator=generator)
    order = torch.randperm(tokens, generator=generator)
    yield replace(
        window,
        token_ids_BT=window.token_ids_BT[:, order],
        phase_BT=None if window.phase_BT is None else 1 - window.phase_BT,
        expert_ids_BTLK=ids,
        routed_BTLE=routed_of(ids, experts),
        router_BTLE=logits.softmax(-1),
        hidden_BTLD=hidden,
    )
    yield replace(
        window,
        token_ids_BT=torch.zeros_like(window.token_ids_BT),
        valid_BT=torch.zeros_like(window.valid_BT),
        scored_BT=torch.zeros_like(window.scored_BT),
        expert_ids_BTLK=torch.full_like(window.expert_ids_BTLK, -1),
        routed_BTLE=torch.zeros_like(window.routed_BTLE),
        router_BTLE=torch.zeros_like(window.router_BTLE),
        hidden_BTLD=None if window.hidden_BTLD is None else torch.zeros_like(window.hidden_BTLD),
    )


def probed_events(tokens: int, layers: int) -> tuple[Event, ...]:
    """Events to probe: the very first, one inside a token, the last layer of a token, and one near the end."""
    chosen = ((0, 0), (tokens // 4, layers // 2), (tokens // 2, layers - 1), (max(0, tokens - 2), layers // 3))
    return tuple(dict.fromkeys(chosen))


def stretch_of(window: Window, tokens: int) -> Window:
    """The first tokens of a window of one sequence, without padding."""
    length = max(1, min(tokens, int(window.valid_BT[0].sum())))
    cut = {n: v[:1, :length] for n, v in vars(window).items() if isinstance(v, Tensor) and v.ndim > 1}
    return replace(window, **cut, document_B=window.document_B[:1])


@torch.no_grad()
def largest_leak(
    predictor: Predictor, window: Window, events: Sequence[Event], others: Iterable[Window] | None = None
) -> float:
    """How far any logit of an event, or of one before it, moves when all that is not known at the event is changed.

    Args:
        window: a stretch of text, without padding before its end. events: (token, layer) to probe.
        others: windows to take the changed future from; None for :func:`other_futures`.

    Returns:
        The largest change, as a share of the largest logit (or of 1, if that is more); infinite where a logit is not a
        number. Above :data:`TOLERANCE` it is a leak.
    """
    predictor.eval()
    before = predictor(window)
    scale = max(1.0, float(before.abs().max()))
    largest = 0.0
    for other in other_futures(window) if others is None else others:
        for event in events:
            known_TL = ~future_of(event, *window.router_BTLE.shape[1:3]).places_TL.to(before.device)
            moved = predictor(with_other_future(window, other, event))[:, known_TL] - before[:, known_TL]
            change = float(moved.abs().max())
            largest = max(largest, change if change == change else float("inf"))
    return largest / scale
