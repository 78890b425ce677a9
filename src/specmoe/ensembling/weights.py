"""How much each member counts: weights that minimise the log loss, and greedy selection; validation part only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specmoe.calibration import Calibration
from specmoe.dataset import Windows, targets_of
from specmoe.metrics import inclusion_log_odds, ranks
from specmoe.predictors.base import Predictor

__all__ = ["Opinions", "Pick", "Selection", "fit_weights", "gather", "log_loss", "recall_of", "select_greedily"]

# All members' logits together: 64 MiB.
_LOGITS = 1 << 24
# Logits that are worked on at once.
_AT_ONCE = 1 << 20
_ITERATIONS = 40
# A member whose share is below this at a horizon costs time and says nothing there.
_SMALLEST_SHARE = 0.01
# Picks that may bring nothing before the selection ends.
_PATIENCE = 2


@dataclass(frozen=True)
class Opinions:
    """What the members say about a sample of the validation events.

    Attributes:
        logits_MNHE: times the factors of their calibrations: log-odds up to a shift of each event and horizon.
        expert_ids_NHK: needed there, -1 for none. known_NH: whether there is something to foresee.
        document_N: whose event it is. top_k: K. documents: in the sample. share: of all events that the sample is.
    """

    logits_MNHE: Tensor
    expert_ids_NHK: Tensor
    known_NH: Tensor
    document_N: Tensor
    top_k: int
    share: float

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.document_N.unique())

    def halves(self, seed: int = 0) -> tuple[Opinions, Opinions] | None:
        """The events of one half of the documents and of the other, drawn by ``seed``; None if there is only one."""
        documents = self.document_N.unique()
        if len(documents) < 2:
            return None
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
        in_first_N = torch.isin(self.document_N, documents[order[: len(documents) // 2]])
        return self._where(in_first_N), self._where(~in_first_N)

    def _where(self, chosen_N: Tensor) -> Opinions:
        return replace(
            self,
            logits_MNHE=self.logits_MNHE[:, chosen_N],
            expert_ids_NHK=self.expert_ids_NHK[chosen_N],
            known_NH=self.known_NH[chosen_N],
            document_N=self.document_N[chosen_N],
        )

    def parts(self) -> Iterator[Opinions]:
        """The events, some at a time, so that what is worked on stays in the processor's cache."""
        rows = max(1, _AT_ONCE // max(1, self.logits_MNHE[:, :1].numel()))
        for first in range(0, len(self.document_N), rows):
            chosen = slice(first, first + rows)
            yield replace(
                self,
                logits_MNHE=self.logits_MNHE[:, chosen],
                expert_ids_NHK=self.expert_ids_NHK[chosen],
                known_NH=self.known_NH[chosen],
                document_N=self.document_N[chosen],
            )


@torch.no_grad()
def gather(
    members: Sequence[tuple[Predictor, Calibration]],
    windows: Windows,
    *,
    seed: int = 0,
    device: str = "cpu",
    logits: int = _LOGITS,
) -> Opinions:
    """Ask all members about the same events of ``windows``.

    Args:
        windows: the validation part. logits: to keep at most; if there are more, a share of the events of every
            document is drawn by ``seed``.
    """
    topology, horizons = windows.topology, members[0][0].horizons
    events = windows.tokens * topology.layers
    share = min(1.0, logits / max(1, events * len(members) * len(horizons) * topology.experts))
    span = (windows.length + windows.context) * topology.layers * len(horizons) * topology.experts
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for rows in torch.arange(len(windows)).split(max(1, _AT_ONCE // span)):
        window = windows.batch(rows).to(device)
        targets = targets_of(window, horizons)
        known_BTSH = targets.known_BTSH.cpu()
        drawn = known_BTSH.any(-1) & (torch.rand(known_BTSH.shape[:3], generator=generator) < share)
        if not drawn.any():
            continue
        said = [
            (member(window) * calibration.scale_SH[..., None].to(device)).cpu()[drawn]
            for member, calibration in members
        ]
        document_BTS = window.document_B.cpu()[:, None, None].expand(drawn.shape)
        ids = targets.expert_ids_BTSHK.cpu()[drawn]
        found.append((torch.stack(said), ids, known_BTSH[drawn], document_BTS[drawn]))
    if not found:
        shape = (len(members), 0, len(horizons), topology.experts)
        nothing = torch.zeros(0, len(horizons), topology.top_k, dtype=torch.long)
        return Opinions(torch.zeros(shape), nothing, nothing[..., 0].bool(), nothing[:, 0, 0], topology.top_k, share)
    said, ids, known, documents = zip(*found, strict=True)
    return Opinions(torch.cat(said, 1), torch.cat(ids), torch.cat(known), torch.cat(documents), topology.top_k, share)


def fit_weights(opinions: Opinions) -> Tensor:
    """Weights [M, H], not negative, of the least log loss.

    The loss is convex in the weights: the shift that makes an event's probabilities sum to K is also the one of
    least loss, so it can be held fixed in the gradient. Weights are squares of what is varied (L-BFGS), which keeps
    them from turning negative. There is nothing to fit where every expert is needed, or without an event.
    """
    count, events, horizons, experts = opinions.logits_MNHE.shape
    start_MH = torch.full((count, horizons), 1 / count)
    if opinions.top_k >= experts or events == 0:
        return start_MH
    root_MH = start_MH.sqrt().requires_grad_()
    optimizer = torch.optim.LBFGS([root_MH], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")
    known_H = opinions.known_NH.sum(0).clamp_min(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for part in opinions.parts():
            loss = (_losses(part, root_MH.square()) / known_H).sum()
            loss.backward()
            total += loss.detach()
        return total

    with torch.enable_grad():
        # The type of a closure in torch's stubs is that of a plain number.
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    weight_MH = root_MH.detach().square()
    if not weight_MH.isfinite().all():
        return start_MH
    return torch.where(weight_MH < _SMALLEST_SHARE * weight_MH.sum(0), 0.0, weight_MH)


def _losses(part: Opinions, weight_MH: Tensor) -> Tensor:
    """Log loss of the inclusion probabilities, summed over events and experts: [H]."""
    mixed_NHE = torch.einsum("mnhe,mh->nhe", part.logits_MNHE, weight_MH)
    shift_NHE = (mixed_NHE - inclusion_log_odds(mixed_NHE, part.top_k)).detach()
    losses = F.binary_cross_entropy_with_logits(mixed_NHE - shift_NHE, _needed(part), reduction="none")
    return (losses.sum(-1) * part.known_NH).sum(0)


def _needed(part: Opinions) -> Tensor:
    """1 where an expert is needed, [N, H, E]."""
    ids = part.expert_ids_NHK
    experts = part.logits_MNHE.shape[-1]
    slots = torch.where(ids >= 0, ids, experts)
    return torch.zeros(*ids.shape[:-1], experts + 1).scatter_(-1, slots, 1.0)[..., :experts]


@torch.no_grad()
def log_loss(opinions: Opinions, weight_MH: Tensor) -> Tensor:
    """Nats an event, all experts together, by horizon [H]; NaN where nothing is to be foreseen."""
    total = sum((_losses(part, weight_MH) for part in opinions.parts()), torch.zeros(weight_MH.shape[1]))
    return total / opinions.known_NH.sum(0)


@torch.no_grad()
def recall_of(opinions: Opinions, weight_MH: Tensor) -> float:
    """recall@K of the weighted sum, mean over the horizons that have events."""
    hits, known_H = torch.zeros(weight_MH.shape[1]), opinions.known_NH.sum(0)
    for part in opinions.parts():
        hits += _hits(torch.einsum("mnhe,mh->nhe", part.logits_MNHE, weight_MH), part)
    there = known_H > 0
    return float((hits[there] / known_H[there]).mean()) if there.any() else 0.0


def _hits(mixed_NHE: Tensor, part: Opinions) -> Tensor:
    """Recall summed over the known events, [H]."""
    ids = part.expert_ids_NHK
    recall = (ranks(mixed_NHE, ids) < part.top_k).sum(-1) / (ids >= 0).sum(-1).clamp_min(1)
    return (recall * part.known_NH).sum(0)


class Pick(NamedTuple):
    """One step of the selection: which member, and recall@K with it, where it was chosen and on the held-back half."""

    member: int
    recall: float
    held_back: float | None = None


@dataclass(frozen=True)
class Selection:
    """What was picked, in order; a member may come several times, and counts as often."""

    picks: tuple[Pick, ...]

    def weights(self, members: int, horizons: int) -> Tensor:
        """Each member's share of the picks, the same at every horizon: [M, H]."""
        counts = torch.bincount(torch.tensor([pick.member for pick in self.picks]), minlength=members)
        return (counts / len(self.picks))[:, None].expand(members, horizons).contiguous()


def select_greedily(opinions: Opinions, picks: int, held_back: Opinions | None = None) -> Selection:
    """Forward selection with replacement (Caruana et al., 2004), by recall@K, from the best single member on.

    Args:
        picks: at most. held_back: events of other documents: the selection ends when they no longer gain, and what
            was picked after their best is dropped. None to make all the picks.
    """
    count, _, horizons, _ = opinions.logits_MNHE.shape
    chosen: list[Pick] = []
    weight_M = torch.zeros(count)
    best = 0
    for _ in range(picks):

        def trial(member: int, so_far: Tensor = weight_M) -> Tensor:
            return (so_far + F.one_hot(torch.tensor(member), count))[:, None].expand(count, horizons)

        recalls = [recall_of(opinions, trial(member)) for member in range(count)]
        member = max(range(count), key=lambda index: recalls[index])
        held = None if held_back is None else recall_of(held_back, trial(member))
        weight_M = weight_M + F.one_hot(torch.tensor(member), count)
        chosen.append(Pick(member, recalls[member], held))
        if held is None or held > (chosen[best].held_back or 0.0):
            best = len(chosen) - 1
        elif len(chosen) - 1 - best >= _PATIENCE:
            break
    return Selection(tuple(chosen[: best + 1]))
