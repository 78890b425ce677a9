"""The checks whose outcome is known beforehand: they hold, and each of them can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from specmoe.dataset import Window, ahead
from specmoe.predictors.base import Predictor, Recipe
from specmoe.predictors.registry import PREDICTORS
from specmoe.results import Interval
from specmoe.suite import controls
from specmoe.suite.causality import TOLERANCE, largest_leak, probed_events, stretch_of
from specmoe.suite.controls import causality_control, controls_of, routing_gap
from specmoe.suite.data import SuiteData, with_shuffled_routing
from specmoe.suite.synthetic_control import HORIZONS, judged, synthetic_controls
from specmoe.trace import Manifest, Source, Trace, TraceWriter


@pytest.fixture(scope="module")
def data(synthetic_path: Path) -> SuiteData:
    return SuiteData.load(synthetic_path, (1, 2))


def ids_only(source: Path, folder: Path) -> Path:
    """The same routing without router inputs, outputs and gates."""
    full = Trace.open(source)
    manifest = Manifest(topology=full.topology, source=Source(kind="test"), fields=("token_ids", "phase", "expert_ids"))
    with TraceWriter(folder, manifest) as writer:
        for index, document in enumerate(full.documents):
            record = replace(full.read(index), gate_weights=None, router_logits=None, hidden=None)
            writer.add(document.doc_id, document.domain, document.text_sha256, record)
    return folder


class _Leaky(Predictor):
    recipe: ClassVar[Recipe] = Recipe(category="training-free", sees="context", source="a test")
    look: Callable[[Window], Tensor]

    def forward(self, window: Window) -> Tensor:
        seen_BTL = type(self).look(window)
        return seen_BTL[..., None, None].expand(*seen_BTL.shape, len(self.horizons), self.topology.experts) + 0.0


def _next_place(values_BTLX: Tensor) -> Tensor:
    return ahead(values_BTLX, [1])[..., 0, 0]


def _over_layers(values_BT: Tensor, window: Window) -> Tensor:
    return values_BT[..., None].expand(*values_BT.shape, window.router_BTLE.shape[2])


def _hidden(window: Window) -> Tensor:
    assert window.hidden_BTLD is not None
    return _next_place(window.hidden_BTLD)


LEAKS: dict[str, Callable[[Window], Tensor]] = {
    "the next layer's router input": _hidden,
    "the next layer's routing": lambda w: _next_place(w.routed_BTLE),
    "the next layer's router output": lambda w: _next_place(w.router_BTLE),
    "the next layer's expert ids": lambda w: _next_place(w.expert_ids_BTLK.float()),
    "its own token's last layer": lambda w: w.routed_BTLE[:, :, -1:, 0].expand(*w.routed_BTLE.shape[:3]),
    "the next token's id": lambda w: _over_layers(w.token_ids_BT.roll(-1, 1).float(), w),
    "how long the text is": lambda w: _over_layers(w.valid_BT.sum(1, keepdim=True).float() + 0 * w.token_ids_BT, w),
    "a mean over the whole text": lambda w: (
        w.routed_BTLE[..., 0].mean(1, keepdim=True).expand_as(w.routed_BTLE[..., 0])
    ),
}


@pytest.mark.parametrize("what", LEAKS)
def test_the_probe_catches_a_leak(what: str, data: SuiteData) -> None:
    class Leaky(_Leaky):
        look = LEAKS[what]

    window = stretch_of(data.journey[1], 24)
    events = probed_events(24, data.topology.layers)
    leaky = Leaky(data.topology, data.horizons)
    assert largest_leak(leaky, window, events) > 100 * TOLERANCE
    honest = PREDICTORS["LayerMarkov"](data.topology, data.horizons)
    control = causality_control(data, [("Honest", honest), ("Leaky", leaky)])
    assert control is not None
    assert (control.value, control.unit, control.holds) == (1, "of 2", False)
    assert "moved: Leaky" in control.note


def test_the_probe_leaves_the_known_alone(data: SuiteData) -> None:
    """One that uses all it may, up to the very event, is no leak."""

    class Honest(_Leaky):
        look = staticmethod(
            lambda w: (
                w.routed_BTLE[..., 0]
                + w.hidden_BTLD[..., 0]
                + _over_layers(w.token_ids_BT.float(), w)
                + ahead(w.router_BTLE, [-1])[..., 0, 0]
            )
        )

    window = stretch_of(data.journey[1], 24)
    assert largest_leak(Honest(data.topology, data.horizons), window, probed_events(24, data.topology.layers)) == 0


def test_logits_that_are_no_numbers_are_a_leak(data: SuiteData) -> None:
    class Broken(_Leaky):
        look = staticmethod(lambda w: w.routed_BTLE[..., 0] * float("nan"))

    window = stretch_of(data.journey[1], 8)
    assert largest_leak(Broken(data.topology, data.horizons), window, [(0, 0)]) == float("inf")


def test_shuffled_routing_keeps_the_frequency_of_every_layer(data: SuiteData) -> None:
    windows = data.train
    before = windows.expert_ids.clone()
    shuffled = with_shuffled_routing(windows)
    assert torch.equal(windows.expert_ids, before)
    assert shuffled.expert_ids.shape == before.shape
    assert shuffled.routed is not None
    assert windows.routed is not None
    assert shuffled.router is not None
    assert windows.router is not None
    torch.testing.assert_close(shuffled.routed.sum((0, 1)), windows.routed.sum((0, 1)))
    torch.testing.assert_close(shuffled.router.sum((0, 1)), windows.router.sum((0, 1)))
    assert (shuffled.expert_ids[~windows.valid] == -1).all()
    # Ids, routing and router outputs of a place stay together.
    picked = shuffled.routed.gather(-1, shuffled.expert_ids.long().clamp_min(0))
    assert (picked[windows.valid] == 1).all()
    moved = (shuffled.expert_ids != before).any(-1)[windows.valid].float().mean()
    assert moved > 0.8
    assert len(with_shuffled_routing(windows, tokens=200)) < len(windows)


@pytest.mark.parametrize("hidden", [True, False], ids=["whole trace", "ids only"])
def test_shuffled_routing_teaches_nothing_and_the_check_could_fail(
    hidden: bool, synthetic_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = synthetic_path if hidden else ids_only(synthetic_path, tmp_path / "ids")
    data = SuiteData.load(path, (1, 2))
    gap = routing_gap(data)
    assert gap is not None
    assert gap.low < 0.01
    assert gap.value < 0.02
    monkeypatch.setattr(controls, "with_shuffled_routing", lambda windows, **_: windows)
    gap = routing_gap(data)
    assert gap is not None
    assert gap.low > 0.2


def test_controls_of_a_trace_with_ids_only(synthetic_path: Path, tmp_path: Path) -> None:
    data = SuiteData.load(ids_only(synthetic_path, tmp_path / "ids"), (2,))
    found = controls_of(data, [("LayerMarkov", PREDICTORS["LayerMarkov"](data.topology, data.horizons))])
    assert all(control.holds for control in found), found
    assert [control.name.split(":")[0].split(" on ")[0] for control in found] == [
        "token table × Markov",
        "causality",
        "synthetic source",
        "synthetic source",
    ]
    # No predictor was trained: nothing to probe, the rest is there.
    assert len(controls_of(data)) == 3


def interval(value: float, half: float = 0.01) -> Interval:
    return Interval(value=value, low=value - half, high=value + half)


def test_the_synthetic_source_is_not_beaten_and_is_reached() -> None:
    beaten, reached = synthetic_controls()
    assert beaten.holds
    assert beaten.value < 0.5
    assert reached.holds
    assert -1 < reached.value < 2
    optimum = dict.fromkeys(HORIZONS, 0.8)

    def by_horizon(value: float) -> dict[int, Interval]:
        return {h: interval(value) for h in HORIZONS}

    # Above by chance is no fault; above for sure is, and is named.
    assert judged({"A": by_horizon(0.805)}, optimum)[0].holds
    too_good, near = judged({"A": by_horizon(0.79), "B": by_horizon(0.83)}, optimum)
    assert not too_good.holds
    assert near.holds
    assert "above it: B" in too_good.note
    assert "above it: A" not in too_good.note
    assert too_good.value == pytest.approx(3)
    fine, far = judged({"A": by_horizon(0.7)}, optimum)
    assert fine.holds
    assert not far.holds
    assert "A" in far.note
