"""Predictions of a whole demand, batched: a simulation never calls a predictor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specmoe.calibration import Calibration
from specmoe.dataset import Windows, tokens_at_once
from specmoe.errors import SpecmoeError
from specmoe.offload.demand import Demand
from specmoe.predictors.base import Predictor
from specmoe.threads import one_thread
from specmoe.trace import Trace

__all__ = ["Predictions", "perfect", "predicted", "shuffled", "with_recall"]

# A chance below this is not worth a place in memory.
_LEAST = 1e-3
_TOKENS = 2048
_MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class Predictions:
    """What is foreseen at every event of a demand.

    Attributes:
        name: of the predictor. horizons: in layers, in execution order.
        experts_VHB: int16, expert of the layer that the horizon points to, likeliest first; -1 for none.
        chance_VHB: float32, probability that the expert is needed there.
    """

    name: str
    horizons: tuple[int, ...]
    experts_VHB: NDArray[np.int16]
    chance_VHB: NDArray[np.float32]

    @classmethod
    def none(cls) -> Predictions:
        """Nothing is foreseen."""
        return cls("none", (), np.zeros((0, 0, 0), dtype=np.int16), np.zeros((0, 0, 0), dtype=np.float32))

    def recall(self, demand: Demand) -> list[float]:
        """Of the experts needed where each horizon points, the share that is foreseen at all: [H], 0 to 1."""
        found = []
        for row, horizon in enumerate(self.horizons):
            needed, listed = demand_table(demand)[horizon:], self._table(row, demand)[:-horizon]
            found.append(float((needed & listed).sum() / max(1, needed.sum())))
        return found

    def _table(self, row: int, demand: Demand) -> NDArray[np.bool_]:
        table = np.zeros((demand.events, demand.topology.experts + 1), dtype=np.bool_)
        np.put_along_axis(table, self.experts_VHB[:, row].astype(np.int64), True, 1)
        return table[:, :-1]


def demand_table(demand: Demand) -> NDArray[np.bool_]:
    """[V, E]: which experts of its layer an event needs."""
    table = np.zeros((demand.events, demand.topology.experts), dtype=np.bool_)
    event_M = np.repeat(np.arange(demand.events), np.diff(demand.starts_V))
    table[event_M, demand.keys_M % demand.topology.experts] = True
    return table


@torch.no_grad()
@one_thread()
def predicted(
    name: str,
    predictor: Predictor,
    calibration: Calibration,
    demand: Demand,
    trace: Trace,
    documents: Sequence[int],
    *,
    device: str = "cpu",
    on_tokens: Callable[[int], None] = lambda _: None,
) -> Predictions:
    """Score every token of a demand's documents, and read the logits as probabilities.

    Tokens of one step are one event: an expert's chance to be needed by any of them is 1 − Π(1 − p). A token that is
    not the last of its sequence in the step says nothing of the next step.

    Args:
        documents: those that ``demand`` was made from, in the same order.
        on_tokens: called with the number of tokens that have been scored.

    Raises:
        SpecmoeError: the result would not fit into memory, or a document lacks the router inputs that others have.
    """
    if "hidden" in trace.manifest.fields:
        lacking = sum(trace.documents[index].hidden_start is None for index in documents)
        if lacking:
            raise SpecmoeError(
                f"{lacking} of {len(documents)} documents have no hidden states; simulate those that have them"
            )
    predictor.eval()
    topology, horizons = demand.topology, predictor.horizons
    largest = int(np.diff(demand.starts_V).max(initial=1))
    budget = min(topology.experts, 2 * max(largest, topology.top_k))
    shape = (demand.events, len(horizons), budget)
    if 6 * np.prod(shape, dtype=np.int64) > _MOST_BYTES:
        raise SpecmoeError(
            f"predictions for {demand.events:,} events and {len(horizons)} horizons do not fit into memory; "
            "simulate fewer documents"
        )
    experts_VHB, chance_VHB = np.full(shape, -1, dtype=np.int16), np.zeros(shape, dtype=np.float32)
    wraps_SH = torch.arange(topology.layers)[:, None] + torch.tensor(horizons) >= topology.layers
    step_N = torch.empty(demand.tokens, dtype=torch.long)
    step_N[torch.from_numpy(demand.order_N)] = torch.from_numpy(
        np.repeat(np.arange(demand.steps), np.diff(demand.first_J))
    )
    lengths = [trace.documents[index].tokens for index in documents]
    first = 0
    for chunk, tokens in _chunks(documents, lengths, demand.batch):
        if tokens == 0:
            continue
        own_N = step_N[first : first + tokens]
        chance = _chances(predictor, calibration, Windows(trace, chunk, length=512, context=64), tokens, device)
        ends = torch.tensor([trace.documents[index].tokens for index in chunk]).cumsum(0) - 1
        last_N = torch.cat([own_N[1:] != own_N[:-1], torch.ones(1, dtype=torch.bool)])
        last_N[ends] = True
        if not last_N.all():
            chance = chance.masked_fill((~last_N)[:, None, None, None] & wraps_SH[..., None], 0.0)
        base, steps = int(own_N.min()), int(own_N.max() - own_N.min()) + 1
        if not torch.equal(own_N, torch.arange(base, base + tokens)):
            missing = chance.new_zeros(steps, *chance.shape[1:])
            missing.index_add_(0, own_N - base, torch.log1p(-chance.clamp_max(1 - 1e-6)))
            chance = -torch.expm1(missing)
        best = chance.topk(budget, -1)
        rows = slice(base * topology.layers, (base + steps) * topology.layers)
        experts_VHB[rows] = best.indices.where(best.values >= _LEAST, -1).flatten(0, 1).to(torch.int16).numpy()
        chance_VHB[rows] = best.values.flatten(0, 1).numpy()
        first += tokens
        on_tokens(first)
    return Predictions(name, horizons, experts_VHB, chance_VHB)


def _chances(predictor: Predictor, calibration: Calibration, windows: Windows, tokens: int, device: str) -> Tensor:
    """[N, S, H, E], one row for each token of some documents."""
    topology = windows.topology
    chance = torch.zeros(tokens, topology.layers, len(predictor.horizons), topology.experts)
    scored_W = windows.scored.sum(1)
    first_W = scored_W.cumsum(0) - scored_W
    for rows, window in windows.by_length(tokens_at_once(topology, len(predictor.horizons), device)):
        scored_BT = window.scored_BT
        place_BT = first_W[rows][:, None] + scored_BT.cumsum(1) - 1
        moved = window.to(device)
        chance[place_BT[scored_BT]] = calibration.apply(predictor(moved)).cpu()[scored_BT]
    return chance


def _chunks(documents: Sequence[int], lengths: Sequence[int], batch: int) -> list[tuple[list[int], int]]:
    """Whole batches of sequences, some thousand tokens together: their documents and how many tokens they have."""
    chunks: list[tuple[list[int], int]] = []
    for first in range(0, len(documents), batch):
        own, tokens = list(documents[first : first + batch]), sum(lengths[first : first + batch])
        if chunks and chunks[-1][1] + tokens <= _TOKENS:
            chunks[-1] = (chunks[-1][0] + own, chunks[-1][1] + tokens)
        else:
            chunks.append((own, tokens))
    return chunks


def perfect(demand: Demand, horizons: Sequence[int]) -> Predictions:
    """Exactly what will be needed, with certainty, at the given horizons."""
    return with_recall(demand, horizons, 1.0, name="perfect")


def with_recall(
    demand: Demand, horizons: Sequence[int], recall: float, *, seed: int = 0, name: str = ""
) -> Predictions:
    """What a predictor of a given recall@K would foresee whose mistakes are drawn evenly.

    Every expert that will be needed stays with the chance ``recall``, else another of the layer stands in its place.
    The chance of all is ``recall``, which is what a calibrated predictor of that quality would say. Where an event
    needs more than half of a layer's experts there are not enough others to be wrong with, and the recall is higher.
    """
    rng = np.random.default_rng(seed)
    experts, sizes = demand.topology.experts, np.diff(demand.starts_V)
    width = int(sizes.max(initial=1))
    needed_VB = np.full((demand.events, width), -1, dtype=np.int16)
    event_M = np.repeat(np.arange(demand.events), sizes)
    place_M = np.arange(demand.accesses) - demand.starts_V[event_M]
    needed_VB[event_M, place_M] = demand.keys_M % experts
    table = demand_table(demand)
    # Numbers that the event's layer has no expert for.
    absent = np.tile(np.arange(experts) >= np.array(demand.topology.experts_L)[:, None], (demand.steps, 1))
    result = np.full((demand.events, len(horizons), width), -1, dtype=np.int16)
    for row, horizon in enumerate(horizons):
        own = np.full_like(needed_VB, -1)
        own[:-horizon] = needed_VB[horizon:]
        if recall < 1:
            # Another expert of the layer, one that is not needed there, each at most once.
            others = rng.random((demand.events, experts), dtype=np.float32)
            others[:-horizon][table[horizon:]] = 2.0
            others[:-horizon][absent[horizon:]] = 2.0
            wrong = np.argsort(others, 1)[:, :width].astype(np.int16)
            free = np.tile(demand.topology.experts_L, demand.steps) - sizes
            usable = np.zeros(own.shape, dtype=np.bool_)
            usable[:-horizon] = np.arange(width) < free[horizon:, None]
            swapped = (rng.random(own.shape) >= recall) & (own >= 0) & usable
            own = np.where(swapped, wrong, own)
        result[:, row] = own
    chance = np.where(result >= 0, np.float32(recall), np.float32(0))
    return Predictions(name or f"recall {recall:.0%}", tuple(horizons), result, chance)


def shuffled(predictions: Predictions, layers: int, *, seed: int = 0) -> Predictions:
    """The null control: every event gets what was foreseen at another event of the same layer."""
    rng = np.random.default_rng(seed)
    events = len(predictions.experts_VHB)
    steps = np.arange(events // max(1, layers))
    other = (rng.permutation(steps)[:, None] * layers + np.arange(layers)).ravel()
    return replace(
        predictions,
        name=f"{predictions.name}, shuffled",
        experts_VHB=predictions.experts_VHB[other],
        chance_VHB=predictions.chance_VHB[other],
    )
