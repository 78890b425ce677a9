"""Probabilities that mean what they say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specmoe.calibration import Calibration, fit_calibration, rising
from specmoe.dataset import Window, Windows, ahead, split_documents
from specmoe.errors import SpecmoeError
from specmoe.evaluation import Tally, evaluate, expected_calibration_error
from specmoe.metrics import inclusion_probabilities
from specmoe.predictors.base import Knowledge, Predictor, Recipe
from specmoe.predictors.registry import PREDICTORS
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Trace, TraceWriter

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def drawn(tmp_path: Path, sharpness: float) -> Windows:
    """Routing drawn by Poisson sampling from known log-odds: the ids follow the recorded logits times ``sharpness``."""
    topology = Topology(model_id="poisson", layers=2, experts=8, top_k=2, hidden_size=4)
    fields = ("token_ids", "phase", "expert_ids", "router_logits")
    generator = torch.Generator().manual_seed(4)
    with TraceWriter(tmp_path / "t", Manifest(topology=topology, source=Source(kind="test"), fields=fields)) as writer:
        for number in range(10):
            logits = 0.6 * torch.randn(400, 2, 8, generator=generator)
            probability = inclusion_probabilities(sharpness * logits, 2)
            chosen = torch.rand(probability.shape, generator=generator) < probability
            # K slots hold the experts drawn; an event with more than K is left without any.
            order = (chosen.float() + 0.5 * torch.rand(chosen.shape, generator=generator)).topk(2, -1).indices
            ids = torch.where(chosen.gather(-1, order) & (chosen.sum(-1, keepdim=True) <= 2), order, -1)
            writer.add(
                f"{number}",
                "d",
                f"{number}",
                RoutingRecord(
                    token_ids=torch.zeros(400, dtype=torch.int32),
                    phase=torch.zeros(400, dtype=torch.uint8),
                    expert_ids=ids.to(torch.int16),
                    router_logits=logits,
                ),
            )
    return Windows(Trace.open(tmp_path / "t"), range(10), length=400)


class Guess(Predictor):
    """The log-odds that the routing was drawn with, distorted."""

    recipe = Recipe(category="training-free", sees="nothing", source="a test")
    factor_L: Tensor
    bent = False

    def forward(self, window: Window) -> Tensor:
        logits = ahead(window.router_BTLE.clamp_min(1e-9).log(), self.horizons)
        if self.bent:
            # Rising, but no straight line: no factor can mend it.
            logits = logits.sign() * logits.abs().pow(3)
        return logits * self.factor_L[:, None, None]


def guess(windows: Windows, factors: list[float], *, bent: bool = False) -> Guess:
    predictor = Guess(windows.topology, (1, 2))
    predictor.factor_L, predictor.bent = torch.tensor(factors), bent
    return predictor


def brier(tally: Tally) -> float:
    return float(tally.sums["brier"].sum() / tally.events.sum())


def errors(tally: Tally) -> list[float]:
    return [interval.value for interval in expected_calibration_error([tally], (1, 2)).values()]


@pytest.mark.parametrize("factors", [[0.2, 0.2], [1.0, 1.0], [4.0, 0.3]])
def test_each_layer_gets_the_factor_that_it_lacks(tmp_path: Path, factors: list[float]) -> None:
    windows = drawn(tmp_path, sharpness=3.0)
    predictor = guess(windows, factors)
    found = fit_calibration(predictor, windows)
    # The events left out move the best factor a little.
    lacking = torch.tensor([math.log(3.0 / factor) for factor in factors])[:, None].expand(2, 2)
    assert found.scale_SH.log().tolist() == [pytest.approx(row, abs=0.35) for row in lacking.tolist()]
    plain, mended = evaluate(predictor, windows), evaluate(predictor, windows, calibration=found)
    assert brier(mended) < brier(plain) + 1e-6
    assert max(errors(mended)) < 0.006


def test_the_curve_mends_what_no_factor_can(tmp_path: Path) -> None:
    windows = drawn(tmp_path, sharpness=3.0)
    predictor = guess(windows, [0.2, 0.2], bent=True)
    found = fit_calibration(predictor, windows)
    straight = Calibration(found.top_k, found.scale_SH, torch.sigmoid(torch.linspace(-12, 12, 97)).expand(2, 2, -1))
    by_factor = evaluate(predictor, windows, calibration=straight)
    by_both = evaluate(predictor, windows, calibration=found)
    assert max(errors(by_both)) < 0.006 < 0.02 < min(errors(by_factor))
    assert brier(by_both) < brier(by_factor)


def test_no_order_is_changed(tmp_path: Path) -> None:
    windows = drawn(tmp_path, sharpness=3.0)
    predictor = guess(windows, [2.0, 0.5])
    found = fit_calibration(predictor, windows)
    assert (found.curve_SHQ.diff(dim=-1) >= 0).all()
    logits = 3 * torch.randn(50, 2, 2, 8, generator=torch.Generator().manual_seed(0))
    probability = found.apply(logits)
    assert ((probability >= 0) & (probability <= 1)).all()
    ordered = probability.gather(-1, logits.argsort(-1))
    assert (ordered.diff(dim=-1) >= 0).all()


def test_an_engine_gets_the_same_probabilities_one_event_at_a_time(tmp_path: Path) -> None:
    windows = drawn(tmp_path, sharpness=3.0)
    found = fit_calibration(guess(windows, [2.0, 0.5]), windows)
    logits = torch.randn(5, 2, 2, 8, generator=torch.Generator().manual_seed(1))
    whole = found.apply(logits)
    for layer in range(2):
        assert torch.equal(found.apply(logits[3, layer], layer=layer), whole[3, layer])


def test_a_file_keeps_every_digit(tmp_path: Path) -> None:
    windows = drawn(tmp_path, sharpness=3.0)
    found = fit_calibration(guess(windows, [2.0, 0.5]), windows)
    again = Calibration.from_json(found.to_json())
    assert again.top_k == found.top_k
    assert torch.equal(again.scale_SH, found.scale_SH)
    assert torch.equal(again.curve_SHQ, found.curve_SHQ)
    for wrong in ("", "{}", "[]", '{"top_k": 2, "scale": [[1]], "curves": [[0.5]]}', found.to_json().replace("1", "x")):
        with pytest.raises(SpecmoeError, match="train it again"):
            Calibration.from_json(wrong)


def test_plain_reads_logits_as_they_are() -> None:
    logits = 2 * torch.randn(40, 3, 2, 8, generator=torch.Generator().manual_seed(2))
    plain = Calibration.plain(2, 3, 2).apply(logits)
    # Straight lines between knots a quarter apart are not quite the sigmoid.
    assert torch.allclose(plain, inclusion_probabilities(logits, 2), atol=1e-3)
    assert (Calibration.plain(8, 3, 2).apply(logits) == 1).all()


def test_infinite_logits_are_surely_and_never() -> None:
    logits = torch.tensor([[[math.inf, 0.0, 0.0, -math.inf]]])
    probability = Calibration.plain(2, 1, 1).apply(logits)[0, 0]
    assert probability.tolist() == pytest.approx([1, 0.5, 0.5, 0], abs=1e-4)


def test_nothing_to_judge_by_changes_nothing(tmp_path: Path) -> None:
    # Documents of one token and one layer: there is no event.
    topology = Topology(model_id="m", layers=1, experts=6, top_k=2, hidden_size=4)
    manifest = Manifest(topology=topology, source=Source(kind="test"), fields=("token_ids", "phase", "expert_ids"))
    with TraceWriter(tmp_path / "t", manifest) as writer:
        for number in range(2):
            ids = torch.tensor([[[0, 1]]], dtype=torch.int16)
            one = torch.zeros(1, dtype=torch.int32)
            record = RoutingRecord(token_ids=one, phase=one.to(torch.uint8), expert_ids=ids)
            writer.add(f"{number}", "d", f"{number}", record)
    predictor = Guess(topology, (1,))
    predictor.factor_L = torch.ones(1)
    found = fit_calibration(predictor, Windows(Trace.open(tmp_path / "t"), [0, 1], length=4))
    plain = Calibration.plain(2, 1, 1)
    assert torch.equal(found.scale_SH, plain.scale_SH)
    assert torch.equal(found.curve_SHQ, plain.curve_SHQ)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 10)), min_size=1, max_size=20))
@quick
def test_isotonic_regression_is_that_of_pooled_neighbours(points: list[tuple[float, float]]) -> None:
    values, weights = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    # Pool adjacent violators (Ayer et al., 1955): blocks of mean, weight and length.
    blocks: list[tuple[float, float, int]] = []
    for value, weight in points:
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (a, u, m), (b, v, n) = blocks[-2:]
            blocks[-2:] = [((a * u + b * v) / (u + v), u + v, m + n)]
    pooled = [mean for mean, _, length in blocks for _ in range(length)]
    assert rising(values, weights).tolist() == pytest.approx(pooled, abs=1e-9)


@pytest.mark.parametrize("name", ["LayerMarkov", "TokenTable", "LayerFrequency"])
def test_on_a_real_split_probabilities_hold_on_documents_never_seen(synthetic_path: Path, name: str) -> None:
    trace = Trace.open(synthetic_path)
    split = split_documents(trace.documents)
    train, validation, test = (Windows(trace, split.parts[name], length=48) for name in ("train", "validation", "test"))
    predictor = PREDICTORS[name](trace.topology, (1, 2))
    predictor.prepare(Knowledge(lambda: train.batches(8)))
    found = fit_calibration(predictor, validation)
    plain, mended = evaluate(predictor, test), evaluate(predictor, test, calibration=found)
    assert brier(mended) <= brier(plain) + 2e-4
    assert max(errors(mended)) < 0.02
