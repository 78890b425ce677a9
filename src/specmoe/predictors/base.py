"""The contract that every predictor keeps, learned or not.

``forward`` scores all events of a window at once; ``step`` scores one event at a time, as an engine would
ask. Both give the same numbers, and neither looks at what is not yet known: at the event (token t, source
layer s) that is everything but the token ids up to t, all routing of earlier tokens, and for token t the
router inputs and outputs of layers up to s.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from specmoe.dataset import Window, routed_of
from specmoe.errors import SpecmoeError
from specmoe.predictors._linear import LinearProbe, fit_linear_probe
from specmoe.predictors.search import SHARED, SearchSpace
from specmoe.topology import Topology

__all__ = ["CompiledStep", "Knowledge", "Observation", "Predictor", "Recipe", "State", "held_bytes", "parameter_count"]

# exp of it is 0 in every floating-point format that is used, and it is finite, so that 0 times it is 0.
_ABSENT = -1e4

Category = Literal["attention-based", "ensemble", "multi-scale", "edge", "training-free"]
Sees = Literal["nothing", "routing", "token", "hidden", "context"]
Scheduler = Literal["cosine", "plateau"]
Objective = Literal["distribution", "membership"]


@dataclass(frozen=True)
class Recipe:
    """What differs between predictors, as data, so that there is one training loop.

    Attributes:
        category: the group it is ranked in. sees: the most telling kind of input it uses; only predictors
            that see the same compare fairly.
        needs: trace fields without which it cannot run; ``routers`` stands for the routers' own weights.
        source: paper (year) or system the method comes from.
        learning_rate: of AdamW. epochs: at most. batch_windows: windows a step. window: tokens in a training
            window; what lies before it is not seen in training.
        scheduler: ``cosine`` (over all epochs) or ``plateau`` (halved when validation stalls).
        objective: ``distribution`` (cross-entropy to the target distribution) or ``membership`` (is an expert among the
            K, each by itself: binary cross-entropy; logits are then log-odds).
        label_smoothing: share of a hard target spread evenly over the experts.
        soft_targets: aim at the router's own distribution where the trace has it. sharpness: the temperature
            of that distribution is chosen for this sharpness (see ``Windows.router_temperature``).
        patience: epochs without a better validation loss before stopping.
        clip: largest gradient norm. weight_decay: of AdamW.
        warmup: share of all steps over which the cosine scheduler first raises the rate linearly.
        width: factor on a predictor's inner width. dropout: share of inner values dropped while training.
            Predictors that use these two read them from ``self.recipe`` when they are built.
        search: where ``specmoe tune`` looks for better values; nothing else depends on it.
    """

    category: Category
    sees: Sees
    source: str
    needs: frozenset[str] = frozenset()
    learning_rate: float = 2e-3
    epochs: int = 0
    batch_windows: int = 32
    window: int = 16
    scheduler: Scheduler = "plateau"
    objective: Objective = "distribution"
    label_smoothing: float = 0.1
    soft_targets: bool = True
    sharpness: float = 0.66
    patience: int = 7
    clip: float = 1.0
    weight_decay: float = 0.01
    warmup: float = 0.0
    width: float = 1.0
    dropout: float = 0.0
    search: SearchSpace = SHARED


@dataclass(frozen=True)
class Knowledge:
    """What a predictor may learn from before the first gradient step.

    Attributes:
        windows: call it to go through the training windows once more, in a fixed order.
        router_weight_LED, router_bias_LE: the model's own routers, None if the trace does not keep them.
        unembedding_VD: the model's output embedding, None if the trace does not keep it.
    """

    windows: Callable[[], Iterable[Window]]
    router_weight_LED: Tensor | None = None
    router_bias_LE: Tensor | None = None
    unembedding_VD: Tensor | None = None
    _probes: dict[tuple[int, ...], LinearProbe | None] = field(default_factory=dict, repr=False)

    def linear_probe(self, horizons: tuple[int, ...]) -> LinearProbe | None:
        """The closed-form probe from router inputs to future router outputs; None without router inputs.

        Fitted once, however many predictors start from it.
        """
        if horizons not in self._probes:
            probe = None
            for window in itertools.islice(self.windows(), 1):
                if window.hidden_BTLD is not None:
                    targets = "log_router" if window.soft else "routed"
                    probe = fit_linear_probe(self.windows, horizons, targets=targets)
            self._probes[horizons] = probe
        return self._probes[horizons]


@dataclass(frozen=True)
class Observation:
    """One event, as an engine sees it when a router has just run.

    Attributes:
        token_id: of the current token. layer: the source layer.
        expert_ids: [K] int64. router: [E] float32, the router's output distribution.
        hidden: [D] float32 router input, or None.
    """

    token_id: int
    layer: int
    expert_ids: Tensor
    router: Tensor
    hidden: Tensor | None


@dataclass
class State:
    """What a predictor carries from event to event of one sequence.

    Attributes:
        tokens: observations of the tokens that can matter. memory: tensors of its own making.
        members: states of the predictors it is made of. views: arrays over some of ``memory``, for a compiled step.
    """

    tokens: list[list[Observation]] = field(default_factory=list)
    memory: dict[str, Tensor] = field(default_factory=dict)
    members: list[State] = field(default_factory=list)
    views: tuple[Any, ...] = ()


class CompiledStep(ABC):
    """A predictor's ``step`` without PyTorch's overhead; weights are taken over once and not followed."""

    @abstractmethod
    def start(self) -> State:
        """The state before the first token of a sequence."""

    @abstractmethod
    def step(self, state: State, observation: Observation) -> NDArray[np.float32]:
        """Logits [H, E] of one event, as the predictor's own ``step`` gives them up to rounding."""


class Predictor(nn.Module, ABC):
    """Scores, for every event, how likely each expert is to be needed at each horizon.

    Args:
        topology: of the model whose routing is predicted.
        horizons: how many MoE layers ahead, in execution order; each at least 1.

    Attributes:
        memory: earlier tokens that can matter; None if all do.
    """

    recipe: ClassVar[Recipe]
    memory: int | None = 0

    def __init__(self, topology: Topology, horizons: Sequence[int] = (1, 2, 3, 4)) -> None:
        super().__init__()
        if not horizons or min(horizons) < 1:
            raise SpecmoeError(f"horizons must be 1 or more, got {list(horizons)}")
        self.topology = topology
        self.horizons = tuple(horizons)
        if topology.experts_per_layer is not None:
            self.register_forward_hook(_without_absent)

    def prepare(self, knowledge: Knowledge) -> None:
        """Take what has a closed form from the training windows: counts, scales, starting weights.

        Raises:
            SpecmoeError: something it needs is not in the trace.
        """

    @abstractmethod
    def forward(self, window: Window) -> Tensor:
        """Logits [B, T, S, H, E] of all events of a window.

        A softmax over E estimates the router's distribution at the place the horizon points to; the order
        of the logits is the order in which to fetch. Calling the predictor, outside of training, also puts experts
        that the place's layer does not have behind all others; ``step`` leaves them where they are.
        """

    def auxiliary_loss(self, window: Window) -> Tensor | None:
        """What training adds to the loss besides the targets, for the window that ``forward`` saw last; or nothing."""
        del window
        return None

    def compiled(self) -> CompiledStep | None:
        """Its fastest form for single events on a processor, None where there is no other than ``step``."""
        return None

    def start(self) -> State:
        """The state before the first token of a sequence."""
        return State()

    @torch.no_grad()
    def step(self, state: State, observation: Observation) -> Tensor:
        """Logits [H, E] of one event. Events come in execution order; ``state`` is updated in place.

        This general form keeps the tokens that can matter and scores them anew. It is exact for every
        predictor whose ``forward`` is causal; predictors that can do with less override it.
        """
        if not state.tokens or observation.layer <= state.tokens[-1][-1].layer:
            state.tokens.append([])
            if self.memory is not None:
                del state.tokens[: -(self.memory + 1)]
        state.tokens[-1].append(observation)
        window = _window_of(state.tokens, self.topology)
        return self(window)[0, -1, observation.layer]


def _without_absent(predictor: nn.Module, _given: Any, logits_BTSHE: Tensor) -> Tensor:
    """Nothing that does not exist is foreseen: such logits become so low that their probability is zero."""
    assert isinstance(predictor, Predictor)
    if predictor.training:
        return logits_BTSHE
    topology = predictor.topology
    places_SH = torch.arange(topology.layers)[:, None] + torch.tensor(predictor.horizons)
    experts_SH = torch.tensor(topology.experts_L)[places_SH % topology.layers]
    absent_SHE = torch.arange(topology.experts) >= experts_SH[..., None]
    return logits_BTSHE.masked_fill(absent_SHE.to(logits_BTSHE.device), _ABSENT)


def parameter_count(predictor: nn.Module) -> int:
    """Numbers that training adjusts (buffers of closed-form statistics do not count)."""
    return sum(parameter.numel() for parameter in predictor.parameters())


def held_bytes(kind: type[Predictor], topology: Topology, horizons: tuple[int, ...]) -> int:
    """Bytes of a predictor's parameters and buffers before it has seen anything; none of them is allocated."""
    # The state of the generators is kept: what is only measured must not change what is drawn afterwards.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        module = kind(topology, horizons)
    return sum(each.numel() * each.element_size() for each in (*module.parameters(), *module.buffers()))


def _window_of(tokens: list[list[Observation]], topology: Topology) -> Window:
    """A window of one sequence whose last token may be unfinished; what is not known is zero."""
    length, layers, experts = len(tokens), topology.layers, topology.experts
    first = tokens[0][0]
    expert_ids = torch.full((1, length, layers, topology.top_k), -1)
    router = torch.zeros(1, length, layers, experts)
    hidden = None if first.hidden is None else torch.zeros(1, length, layers, topology.hidden_size)
    for t, events in enumerate(tokens):
        for event in events:
            expert_ids[0, t, event.layer] = event.expert_ids
            router[0, t, event.layer] = event.router
            if hidden is not None and event.hidden is not None:
                hidden[0, t, event.layer] = event.hidden
    return Window(
        token_ids_BT=torch.tensor([[events[0].token_id for events in tokens]]),
        valid_BT=torch.ones(1, length, dtype=torch.bool),
        scored_BT=torch.ones(1, length, dtype=torch.bool),
        expert_ids_BTLK=expert_ids,
        routed_BTLE=routed_of(expert_ids, experts),
        router_BTLE=router,
        hidden_BTLD=hidden,
        soft=True,
        document_B=torch.zeros(1, dtype=torch.long),
    )
