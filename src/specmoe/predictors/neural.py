"""What the learned predictors share: how a window becomes events, and how events are scored one by one.

A learned predictor is three functions. ``encode_tokens`` sums up each finished token; ``encode_context``
tells every token what came before it (and nothing else); ``score`` turns an event's own inputs and that
context into logits. ``forward`` runs them over a whole window. ``step`` runs the first two once a token
and the third once an event, which is what makes context affordable inside a layer's time budget.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specmoe.dataset import Window
from specmoe.predictors.base import Knowledge, Observation, Predictor, State
from specmoe.predictors.blocks import LinearSkip
from specmoe.topology import Topology

__all__ = ["Context", "Events", "NeuralPredictor"]

Context = tuple[Tensor, ...]


@dataclass(frozen=True)
class Events:
    """The inputs of the events (t, s), all of them known when the router of layer s has run.

    Attributes:
        layers_S: source layers that are scored.
        hidden_BTSD: standardised router inputs, None where the trace has none.
        routes_BTLE: router outputs of the current token; those of layers above s must not be used for s.
        context: what ``encode_context`` gave, each tensor [B, T, ...].
    """

    layers_S: Tensor
    hidden_BTSD: Tensor | None
    routes_BTLE: Tensor
    context: Context


class NeuralPredictor(Predictor):
    """Base of the learned predictors."""

    hidden_mean_LD: Tensor
    hidden_scale_LD: Tensor

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__(topology, horizons)
        self.register_buffer("hidden_mean_LD", torch.zeros(topology.layers, topology.hidden_size))
        self.register_buffer("hidden_scale_LD", torch.ones(topology.layers, topology.hidden_size))

    def prepare(self, knowledge: Knowledge) -> None:
        """Standardise the router inputs and start linear skips from the closed-form probe."""
        probe = knowledge.linear_probe(self.horizons)
        if probe is None:
            return
        self.hidden_mean_LD.copy_(probe.mean_LD)
        self.hidden_scale_LD.copy_(probe.scale_LD)
        for module in self.modules():
            if isinstance(module, LinearSkip):
                module.warm_start(probe)

    def encode_tokens(self, routes_BTLE: Tensor, hidden_BTLD: Tensor | None) -> Tensor:
        """Sum up finished tokens: [B, T, C]. Each token by itself."""
        del hidden_BTLD
        return routes_BTLE.new_zeros(*routes_BTLE.shape[:2], 0)

    def encode_context(self, tokens_BTC: Tensor) -> Context:
        """What each token may know of the tokens before it, each tensor [B, T, ...]; strictly causal."""
        del tokens_BTC
        return ()

    def current(self, context: Context) -> Context:
        """The part of a context that belongs to the last token: what ``step`` scores with."""
        return tuple(tensor[:, -1:] for tensor in context)

    @abstractmethod
    def score(self, events: Events) -> Tensor:
        """Logits [B, T, S, H, E]."""

    def forward(self, window: Window) -> Tensor:
        """Logits [B, T, L, H, E] of all events of a window."""
        hidden = self._standardise(window.hidden_BTLD)
        context = self.encode_context(self.encode_tokens(window.router_BTLE, hidden))
        layers = torch.arange(self.topology.layers, device=window.router_BTLE.device)
        return self.score(Events(layers, hidden, window.router_BTLE, context))

    @torch.no_grad()
    def step(self, state: State, observation: Observation) -> Tensor:
        """Logits [H, E] of one event; the context is encoded once, at a token's first event."""
        layer, memory = observation.layer, state.memory
        if "routes" not in memory or layer <= int(memory["layer"]):
            self._begin_token(memory)
        hidden = None
        if observation.hidden is not None:
            hidden = (observation.hidden - self.hidden_mean_LD[layer]) / self.hidden_scale_LD[layer]
            memory.setdefault("hidden", torch.zeros_like(self.hidden_mean_LD))[layer] = hidden
            hidden = hidden.view(1, 1, 1, -1)
        memory["routes"][layer] = observation.router
        memory["layer"] = torch.tensor(layer)
        context = tuple(memory[f"context{i}"] for i in range(int(memory["contexts"])))
        events = Events(torch.tensor([layer]), hidden, memory["routes"][None, None], context)
        return self.score(events)[0, 0, 0]

    def _begin_token(self, memory: dict[str, Tensor]) -> None:
        if "routes" in memory:
            hidden = memory["hidden"][None, None] if "hidden" in memory else None
            summary = self.encode_tokens(memory["routes"][None, None], hidden)
            past = torch.cat([memory["past"], summary], 1)
            memory["past"] = past if self.memory is None else past[:, max(0, past.shape[1] - self.memory) :]
        memory["routes"] = torch.zeros(self.topology.layers, self.topology.experts)
        if "past" not in memory:
            memory["past"] = self.encode_tokens(memory["routes"][None, None], None)[:, :0]
        past = memory["past"]
        # The current token stands last and is not looked at: the context is strictly causal.
        context = self.current(self.encode_context(torch.cat([past, past.new_zeros(1, 1, past.shape[2])], 1)))
        memory["contexts"] = torch.tensor(len(context))
        memory.update({f"context{i}": tensor for i, tensor in enumerate(context)})

    def _standardise(self, hidden_BTLD: Tensor | None) -> Tensor | None:
        if hidden_BTLD is None:
            return None
        return (hidden_BTLD - self.hidden_mean_LD) / self.hidden_scale_LD
