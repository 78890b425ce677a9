"""Closed-form linear probes from the router's input to the routing ahead.

One probe per source layer and horizon, all from one pass over the windows: the normal equations are sums
over events, so that nothing but these sums is kept. Letters as everywhere; M = D + 1 is the hidden state
with a constant 1 behind it, Y = H E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specmoe.dataset import Targets, Window, targets_of
from specmoe.errors import SpecmoeError

__all__ = [
    "PENALTIES",
    "LinearProbe",
    "Moments",
    "TargetKind",
    "choose_penalty",
    "collect_moments",
    "fit_linear_probe",
    "held_back",
    "hidden_of",
    "per_layer_product",
    "solve_probe",
]

TargetKind = Literal["routed", "log_router"]
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

# Below this the router's output says no more than "not this one", but its logarithm would rule the squares.
_LEAST_SHARE = 1e-9


@dataclass(frozen=True)
class LinearProbe:
    """Affine maps of the standardised hidden state, one per source layer and horizon.

    Attributes:
        mean_LD, scale_LD: float32; the hidden state enters as (hidden - mean) / scale.
        weight_LHDE, bias_LHE: float32.
    """

    mean_LD: Tensor
    scale_LD: Tensor
    weight_LHDE: Tensor
    bias_LHE: Tensor

    def __call__(self, hidden_BTLD: Tensor) -> Tensor:
        """Outputs [B, T, S, H, E] for the router inputs at the source layers."""
        return per_layer_product((hidden_BTLD - self.mean_LD) / self.scale_LD, self.weight_LHDE) + self.bias_LHE


def fit_linear_probe(
    windows: Callable[[], Iterable[Window]],
    horizons: Sequence[int],
    *,
    targets: TargetKind,
    penalties: Sequence[float] = PENALTIES,
) -> LinearProbe:
    """Ridge regression of what is to be foreseen on the hidden state (Hoerl and Kennard, 1970).

    The penalty counts against the standardised features' covariance. It is chosen per source layer and
    horizon by the squared error on the held-back documents (see :func:`held_back`); the probe is then
    solved on everything.

    Args:
        windows: goes through the training windows in a fixed order. horizons: as the predictor's.
        targets: ``routed`` fits the 0/1 membership among the K; ``log_router`` fits the logarithm of the
            router's distribution with its mean over the experts taken off, so that the outputs are logits
            of a softmax.
        penalties: to choose from, above 0, ascending.

    Raises:
        SpecmoeError: no hidden states, hidden states that are not finite, or ``log_router`` without
            router logits in the trace.
    """
    fitted, held = collect_moments(windows, horizons, [targets])
    return solve_probe(fitted + held, targets, choose_penalty(fitted, held, targets, penalties))


@dataclass
class Moments:
    """Sums over the events of some windows, float64.

    An event whose target is unknown at some horizons only is rare (the end of a window), so that one Gram
    matrix serves all horizons of a source layer and what a horizon has beyond it is kept apart.

    Attributes:
        gram_LMM: of the events known at all horizons. extra: (source layer, horizon index) → [M, M], of
            the other events known at that horizon.
        cross: target kind → [L, H, M, E]. squares: target kind → [L, H, E], sums of squared targets.
    """

    gram_LMM: Tensor
    extra: dict[tuple[int, int], Tensor]
    cross: dict[str, Tensor]
    squares: dict[str, Tensor]

    def gram_HMM(self, layer: int) -> Tensor:
        """The exact Gram matrices of one source layer."""
        horizons = next(iter(self.cross.values())).shape[1]
        gram = self.gram_LMM[layer].expand(horizons, -1, -1).clone()
        for (at, h), matrix in self.extra.items():
            if at == layer:
                gram[h] += matrix
        return gram

    def __add__(self, other: Moments) -> Moments:
        extra = dict(self.extra)
        for key, matrix in other.extra.items():
            extra[key] = extra[key] + matrix if key in extra else matrix
        return Moments(
            self.gram_LMM + other.gram_LMM,
            extra,
            {kind: value + other.cross[kind] for kind, value in self.cross.items()},
            {kind: value + other.squares[kind] for kind, value in self.squares.items()},
        )

    def add(self, hidden_NLD: Tensor, known_NLH: Tensor, values: dict[str, Tensor]) -> None:
        """Add N tokens' events; ``values`` are targets [N, L, H, E] by kind."""
        one = hidden_NLD.new_ones(*hidden_NLD.shape[:2], 1)
        features_LNM = torch.cat([hidden_NLD, one], -1).double().transpose(0, 1)
        known_LNH = known_NLH.transpose(0, 1)
        everywhere_LN = known_LNH.all(-1)
        counted_LNM = features_LNM * everywhere_LN[..., None]
        self.gram_LMM += counted_LNM.transpose(1, 2) @ counted_LNM
        rest_LNH = known_LNH & ~everywhere_LN[..., None]
        for layer, h in rest_LNH.any(1).nonzero().tolist():
            rows = features_LNM[layer][rest_LNH[layer, :, h]]
            matrix = rows.T @ rows
            self.extra[layer, h] = self.extra[layer, h] + matrix if (layer, h) in self.extra else matrix
        for kind, value_NLHE in values.items():
            counted_NLHE = value_NLHE.double() * known_NLH[..., None]
            cross_LMY = features_LNM.transpose(1, 2) @ counted_NLHE.transpose(0, 1).flatten(2)
            self.cross[kind] += cross_LMY.unflatten(-1, value_NLHE.shape[2:]).transpose(1, 2)
            self.squares[kind] += counted_NLHE.square().sum(0)


def collect_moments(
    windows: Callable[[], Iterable[Window]], horizons: Sequence[int], kinds: Sequence[TargetKind]
) -> tuple[Moments, Moments]:
    """The moments of the fitting and of the held-back windows, for several kinds of target in one pass.

    Raises:
        SpecmoeError: as :func:`fit_linear_probe`.
    """
    parts: tuple[Moments, Moments] | None = None
    for window, held_B in held_back(windows()):
        hidden = hidden_of(window, "a linear probe")
        if parts is None:
            parts = (_empty(window, len(horizons), kinds), _empty(window, len(horizons), kinds))
        targets = targets_of(window, horizons)
        values = {kind: target_values(targets, window, kind) for kind in kinds}
        own_BT = window.valid_BT & window.scored_BT
        for part, chosen_B in zip(parts, (~held_B, held_B), strict=True):
            rows = own_BT & chosen_B[:, None]
            if bool(rows.any()):
                part.add(hidden[rows], targets.known_BTSH[rows], {k: v[rows] for k, v in values.items()})
    if parts is None:
        raise SpecmoeError("there is no training window to fit a linear probe on; collect more text")
    # Every event's hidden state enters these sums, if only times zero, and zero times NaN is NaN.
    if not all(bool(torch.isfinite(sums).all()) for part in parts for sums in part.cross.values()):
        raise SpecmoeError("the hidden states hold NaN or Inf; the model's run is at fault, or the trace is damaged")
    return parts


def held_back(windows: Iterable[Window]) -> Iterator[tuple[Window, Tensor]]:
    """Each batch with the windows [B] bool that are for validation: every fifth document, from the second."""
    number: dict[int, int] = {}
    for window in windows:
        order = [number.setdefault(index, len(number)) for index in window.document_B.tolist()]
        yield window, torch.tensor(order, device=window.token_ids_BT.device) % 5 == 1


def target_values(targets: Targets, window: Window, kind: TargetKind) -> Tensor:
    """What the probe is to put out, [B, T, S, H, E].

    Raises:
        SpecmoeError: ``log_router`` without router logits.
    """
    if kind == "routed":
        return targets.routed_BTSHE
    if not window.soft:
        raise SpecmoeError("a probe of the router's distribution needs router_logits, which this trace does not keep")
    logs = targets.router_BTSHE.clamp_min(_LEAST_SHARE).log()
    return logs - logs.mean(-1, keepdim=True)


def choose_penalty(fitted: Moments, held: Moments, kind: TargetKind, penalties: Sequence[float]) -> Tensor:
    """The penalty with the least squared error on the held-back windows, [L, H] float64.

    Without held-back windows (a single document) it is the middle one.
    """
    middle = penalties[len(penalties) // 2]
    layers, horizons = fitted.cross[kind].shape[:2]
    best = fitted.gram_LMM.new_full((layers, horizons), middle)
    choices = best.new_tensor(list(penalties))
    for layer in range(layers):
        mean_D, scale_D = _spread(fitted.gram_LMM[layer])
        gram_HMM, cross_HME = _standardised(fitted, kind, layer, mean_D, scale_D)
        held_HMM, held_HME = _standardised(held, kind, layer, mean_D, scale_D)
        errors = []
        for choice in choices:
            weight_HME = _solve(gram_HMM, cross_HME, choice.expand(horizons))
            explained = weight_HME * (2 * held_HME - held_HMM @ weight_HME)
            errors.append(held.squares[kind][layer].sum(-1) - explained.sum((1, 2)))
        seen_H = held_HMM[:, -1, -1] > 0
        best[layer] = torch.where(seen_H, choices[torch.stack(errors).argmin(0)], best[layer])
    return best


def solve_probe(moments: Moments, kind: TargetKind, penalty_LH: Tensor) -> LinearProbe:
    """The probe that minimises the squared error plus the penalty; the bias is not penalised."""
    means, scales, weights = [], [], []
    for layer in range(len(moments.gram_LMM)):
        mean_D, scale_D = _spread(moments.gram_LMM[layer])
        means.append(mean_D)
        scales.append(scale_D)
        weights.append(_solve(*_standardised(moments, kind, layer, mean_D, scale_D), penalty_LH[layer]))
    weight_LHME = torch.stack(weights).float()
    return LinearProbe(
        torch.stack(means).float(),
        torch.stack(scales).float(),
        weight_LHME[:, :, :-1].contiguous(),
        weight_LHME[:, :, -1].contiguous(),
    )


def hidden_of(window: Window, who: str) -> Tensor:
    """The window's router inputs.

    Raises:
        SpecmoeError: it has none.
    """
    if window.hidden_BTLD is None:
        raise SpecmoeError(f"{who} needs the field hidden, which this trace does not keep; capture it with hidden")
    return window.hidden_BTLD


def per_layer_product(hidden_BTLD: Tensor, weight_LHDE: Tensor) -> Tensor:
    """Each source layer's hidden state through its own matrices, [B, T, S, H, E]."""
    layers, horizons, width, experts = weight_LHDE.shape
    features_LND = hidden_BTLD.flatten(0, 1).transpose(0, 1)
    weight_LDY = weight_LHDE.transpose(1, 2).reshape(layers, width, horizons * experts)
    product = (features_LND @ weight_LDY).transpose(0, 1)
    return product.reshape(*hidden_BTLD.shape[:2], layers, horizons, experts)


def _empty(window: Window, horizons: int, kinds: Sequence[TargetKind]) -> Moments:
    layers, experts = window.routed_BTLE.shape[2:]
    size = hidden_of(window, "a linear probe").shape[-1] + 1
    like = torch.zeros(0, dtype=torch.float64, device=window.token_ids_BT.device)
    return Moments(
        like.new_zeros(layers, size, size),
        {},
        {kind: like.new_zeros(layers, horizons, size, experts) for kind in kinds},
        {kind: like.new_zeros(layers, horizons, experts) for kind in kinds},
    )


def _spread(gram_MM: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and scale [D] of the features."""
    count = gram_MM[-1, -1].clamp_min(1)
    mean = gram_MM[-1, :-1] / count
    variance = gram_MM.diagonal()[:-1] / count - mean.square()
    # A feature that does not vary (up to rounding) is left as it is: centred, it is zero.
    varies = variance > 1e-9 * mean.square()
    return mean, torch.where(varies, variance, torch.ones_like(variance)).sqrt()


def _standardised(moments: Moments, kind: str, layer: int, mean_D: Tensor, scale_D: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices [H, M, M] and cross sums [H, M, E] of one source layer, as of standardised features."""
    gram_HMM, cross_HME = moments.gram_HMM(layer), moments.cross[kind][layer].clone()
    zero = mean_D.new_zeros(1)
    mean_M, scale_M = torch.cat([mean_D, zero]), torch.cat([scale_D, zero + 1])
    # The constant's row and column hold the sums, so that centring takes off multiples of them.
    gram_HMM -= mean_M[:, None] * gram_HMM[:, -1:, :]
    gram_HMM -= gram_HMM[:, :, -1:] * mean_M
    cross_HME -= mean_M[:, None] * cross_HME[:, -1:, :]
    return gram_HMM / (scale_M[:, None] * scale_M), cross_HME / scale_M[:, None]


def _solve(gram_HMM: Tensor, cross_HME: Tensor, penalty_H: Tensor) -> Tensor:
    """Weights [H, M, E] on standardised features, the bias last and free of penalty."""
    count_H = gram_HMM[:, -1, -1]
    ridge_HM = penalty_H[:, None].repeat(1, gram_HMM.shape[-1])
    # Without a single event even the bias needs something to divide by.
    ridge_HM[:, -1] = (count_H == 0).to(ridge_HM)
    per_event = 1 / count_H.clamp_min(1)[:, None, None]
    factor = torch.linalg.cholesky(gram_HMM * per_event + torch.diag_embed(ridge_HM))
    return torch.cholesky_solve(cross_HME * per_event, factor)
