"""Probabilities that mean what they say: from a predictor's logits to the chance that an expert is needed.

Two steps, both fitted on the validation part and both without effect on the order of the experts at an event. First
one factor for each source layer and horizon (temperature scaling; Guo et al., 2017) brings the log-odds of the
inclusion probabilities near the truth: how sharp a predictor is differs more between layers than anything else does.
Then a rising curve (isotonic regression; Zadrozny and Elkan, 2002), again for each source layer and horizon but leaning
on that of all layers together, replaces each log-odds by the frequency that was observed there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specmoe.dataset import Windows, targets_of
from specmoe.errors import SpecmoeError
from specmoe.metrics import inclusion_log_odds
from specmoe.predictors.base import Predictor

__all__ = ["Calibration", "fit_calibration", "rising"]

# The curves are given at these log-odds and straight in between.
_LARGEST, _STEPS = 12.0, 96
_DIGITS = 5
# How many experts seen at a knot weigh as much as the curve of all layers does.
_SHARED_WEIGHT = 30.0
_KNOTS = torch.linspace(-_LARGEST, _LARGEST, _STEPS + 1)
# Logits that are looked at: for the factors some hundred events for each are plenty, the curves want more.
_SCALE_LOGITS, _CURVE_LOGITS = 1 << 19, 1 << 24


@dataclass(frozen=True)
class Calibration:
    """How to read one predictor's logits.

    Attributes:
        top_k: K. scale_SH: factor on the logits, by source layer and horizon.
        curve_SHQ: probability at each knot of the log-odds, by source layer and horizon; rises along Q.
    """

    top_k: int
    scale_SH: Tensor
    curve_SHQ: Tensor

    @classmethod
    def plain(cls, top_k: int, layers: int, horizons: int) -> Calibration:
        """One that takes logits as they are."""
        return cls(top_k, torch.ones(layers, horizons), torch.sigmoid(_KNOTS).expand(layers, horizons, -1))

    def apply(self, logits: Tensor, layer: int | None = None) -> Tensor:
        """Probability that each expert is among the K.

        Args:
            logits: [..., S, H, E], as ``forward`` gives them; with ``layer`` [..., H, E], as ``step`` gives them
                at that source layer.

        Returns:
            The same shape, in [0, 1]. At an event they sum to K only roughly: that they do exactly would be a
            constraint that the truth does not put on probabilities given by one number each.
        """
        experts = logits.shape[-1]
        if self.top_k >= experts:
            return torch.ones_like(logits)
        scale, offset = self.scale_SH, _offsets(*self.scale_SH.shape)
        if layer is not None:
            scale, offset = scale[layer], offset[layer]
        place = _place(inclusion_log_odds(logits * scale[..., None].to(logits.device), self.top_k))
        knot = place.floor().clamp_max(_STEPS - 1)
        # All curves as one list: a gather along the knots would need them spread over every event.
        index = knot.long() + offset[..., None].to(logits.device)
        curves = self.curve_SHQ.flatten().to(logits.device)
        return curves.take(index) + curves.diff().take(index) * (place - knot)

    def to_json(self) -> str:
        """For a file beside the weights."""

        def rows(table: Tensor) -> list[list[float]]:
            return [[round(value, _DIGITS) for value in row] for row in table.tolist()]

        curves = rows(self.curve_SHQ.flatten(0, 1))
        return json.dumps({"top_k": self.top_k, "scale": rows(self.scale_SH), "curves": curves})

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Inverse of :meth:`to_json`.

        Raises:
            SpecmoeError: it is not one.
        """
        try:
            content = json.loads(text)
            scale, curves = (torch.tensor(content[name], dtype=torch.float32) for name in ("scale", "curves"))
            if scale.ndim != 2 or curves.shape != (scale.numel(), _STEPS + 1):
                raise ValueError(f"tables of {tuple(scale.shape)} and {tuple(curves.shape)}")
            return cls(int(content["top_k"]), scale, curves.view(*scale.shape, -1))
        except (ValueError, KeyError, TypeError) as error:
            raise SpecmoeError(f"the predictor's calibration cannot be read ({error}); train it again") from error


@torch.no_grad()
def fit_calibration(predictor: Predictor, windows: Windows, device: str = "cpu") -> Calibration:
    """Fit both steps on windows that are not the test part; all of them, or evenly spaced ones if there are many."""
    predictor.eval()
    topology, horizons = windows.topology, len(predictor.horizons)
    plain = Calibration.plain(topology.top_k, topology.layers, horizons)
    if topology.top_k >= topology.experts:
        return plain
    logits_per_token = topology.layers * horizons * topology.experts
    span = windows.length + windows.context
    count = min(len(windows), max(1, _CURVE_LOGITS // (logits_per_token * span)))
    rows = torch.linspace(0, len(windows) - 1, count).long()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for some in rows.split(max(1, _SCALE_LOGITS // (logits_per_token * span))):
        window = windows.batch(some).to(device)
        targets = targets_of(window, predictor.horizons)
        asked = targets.known_BTSH.flatten(2).any(-1)
        found.append((predictor(window)[asked], targets.routed_BTSHE[asked], targets.known_BTSH[asked]))
    logits_NSHE, routed_NSHE, known_NSH = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    if not known_NSH.any():
        return plain
    chosen = torch.linspace(0, len(logits_NSHE) - 1, min(len(logits_NSHE), max(1, _SCALE_LOGITS // logits_per_token)))
    chosen = chosen.long()
    scale_SH = _best_scale(logits_NSHE[chosen], routed_NSHE[chosen], known_NSH[chosen], topology.top_k)
    scale_SH = scale_SH.round(decimals=_DIGITS)
    curve_SHQ = _curves(logits_NSHE, routed_NSHE, known_NSH, scale_SH, topology.top_k)
    # Rounded as in a file, so that what is judged is what is kept.
    return Calibration(topology.top_k, scale_SH, curve_SHQ.round(decimals=_DIGITS))


def _best_scale(logits_NSHE: Tensor, routed_NSHE: Tensor, known_NSH: Tensor, top_k: int) -> Tensor:
    """The factor of least Brier score for each source layer and horizon, [S, H]; 1 where there is no event."""
    count_SH = known_NSH.sum(0)
    best_SH, log_scale_SH = torch.full(count_SH.shape, math.inf), torch.zeros(count_SH.shape)

    def judge(tried_SH: Tensor) -> None:
        nonlocal best_SH, log_scale_SH
        odds = inclusion_log_odds(logits_NSHE * tried_SH.exp()[..., None], top_k)
        brier_SH = ((odds.sigmoid() - routed_NSHE).square().mean(-1) * known_NSH).sum(0)
        log_scale_SH = torch.where(brier_SH < best_SH, tried_SH, log_scale_SH)
        best_SH = torch.minimum(best_SH, brier_SH)

    for step in range(-6, 11):
        judge(torch.full(count_SH.shape, step / 2))
    coarse_SH = log_scale_SH
    for step in range(-4, 5):
        judge(coarse_SH + step / 10)
    return torch.where(count_SH > 0, log_scale_SH, 0.0).exp()


def _curves(logits_NSHE: Tensor, routed_NSHE: Tensor, known_NSH: Tensor, scale_SH: Tensor, top_k: int) -> Tensor:
    """The observed frequency at each knot of the log-odds, made to rise: [S, H, Q]."""
    layers, horizons = scale_SH.shape
    shape = (layers, horizons, len(_KNOTS))
    count_SHQ, observed_SHQ = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    rows = max(1, _SCALE_LOGITS // logits_NSHE[0].numel())
    parts = (tensor.split(rows) for tensor in (logits_NSHE, routed_NSHE, known_NSH))
    for logits, routed, known in zip(*parts, strict=True):
        place = _place(inclusion_log_odds(logits * scale_SH[..., None], top_k))
        knot = place.floor().clamp_max(_STEPS - 1)
        index = (knot.long() + _offsets(layers, horizons)[..., None]).flatten()
        # Shared by the knots on both sides, as it will be read: else predictions that hardly differ, all on one side
        # of a knot, would leave the other one to what stands in.
        for side, share in ((0, knot + 1 - place), (1, place - knot)):
            weight = share * known[..., None]
            for sums, values in ((count_SHQ, weight), (observed_SHQ, routed * weight)):
                sums += torch.bincount(index + side, values.flatten().double(), sums.numel()).view(shape)
    # What was seen in all layers stands in where a layer shows little, and the log-odds themselves where nothing was.
    predicted_Q = torch.sigmoid(_KNOTS).double()
    shared_HQ = _rising_rows(count_SHQ.sum(0), observed_SHQ.sum(0), predicted_Q, 1.0)
    return _rising_rows(count_SHQ, observed_SHQ, shared_HQ, _SHARED_WEIGHT).float()


def _rising_rows(count: Tensor, observed: Tensor, prior: Tensor, weight: float) -> Tensor:
    """Rising curves [..., Q] through the observed frequencies and ``weight`` made-up experts a knot as in ``prior``."""
    count, observed = count + weight, observed + weight * prior
    rows = zip((observed / count).flatten(0, -2), count.flatten(0, -2), strict=True)
    return torch.stack([rising(values, weights) for values, weights in rows]).view(count.shape)


def _place(odds: Tensor) -> Tensor:
    """Log-odds in numbers of knots from the first."""
    return (odds.clamp(-_LARGEST, _LARGEST) + _LARGEST) * (_STEPS / (2 * _LARGEST))


def _offsets(layers: int, horizons: int) -> Tensor:
    """Where each curve begins when all lie in a row: [S, H]."""
    return torch.arange(layers * horizons).view(layers, horizons) * len(_KNOTS)


def rising(values_Q: Tensor, weights_Q: Tensor) -> Tensor:
    """Isotonic regression: the rising sequence nearest to ``values_Q`` in the weighted sum of squares.

    By the min-max formula (Barlow et al., 1972): at j, the largest over i ≤ j of the smallest over k ≥ j of the mean
    from i to k.

    Args:
        values_Q: float64. weights_Q: positive.
    """
    zero = torch.zeros(1, dtype=values_Q.dtype)
    sums = torch.cat([zero, (values_Q * weights_Q).cumsum(0)])
    weights = torch.cat([zero, weights_Q.cumsum(0)])
    mean_ik = (sums[None, 1:] - sums[:-1, None]) / (weights[None, 1:] - weights[:-1, None])
    upper = torch.ones_like(mean_ik, dtype=torch.bool).triu()
    mean_ik = torch.where(upper, mean_ik, math.inf)
    least_ij = mean_ik.flip(1).cummin(1).values.flip(1)
    return torch.where(upper, least_ij, -math.inf).amax(0)
