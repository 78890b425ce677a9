"""Sums per document, intervals that cover the truth as often as they say, and calibration."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specmoe.calibration import Calibration, fit_calibration
from specmoe.dataset import Window, Windows, ahead, targets_of
from specmoe.evaluation import (
    PHASES,
    Ratios,
    Tally,
    by_horizon,
    documents_of,
    evaluate,
    expected_calibration_error,
    interval_of,
    paired_difference,
    recall_by_layer,
    reliability,
    resampled,
    sums_by_document,
)
from specmoe.metrics import CALIBRATION_BINS, event_metrics, inclusion_probabilities
from specmoe.predictors.base import Knowledge, Predictor, Recipe
from specmoe.predictors.registry import PREDICTORS
from specmoe.residency import replay
from specmoe.results import Interval, TestDocuments
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Trace, TraceWriter

TOPOLOGY = Topology(model_id="evaluation", layers=3, experts=6, top_k=2, hidden_size=4)
HORIZONS = (1, 2, 5)


def write(path: Path, lengths: tuple[int, ...], topology: Topology = TOPOLOGY) -> Trace:
    """Random routing; the second half of each document counts as decoded, and some slots are empty."""
    fields = ("token_ids", "phase", "expert_ids", "router_logits")
    generator = torch.Generator().manual_seed(0)
    with TraceWriter(path, Manifest(topology=topology, source=Source(kind="test"), fields=fields)) as writer:
        for number, tokens in enumerate(lengths):
            logits = 2 * torch.randn(tokens, topology.layers, topology.experts, generator=generator)
            ids = logits.topk(topology.top_k, -1).indices
            ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, -1, ids)
            record = RoutingRecord(
                token_ids=torch.arange(tokens, dtype=torch.int32),
                phase=(torch.arange(tokens) >= tokens // 2).to(torch.uint8),
                expert_ids=ids.to(torch.int16),
                router_logits=logits,
            )
            writer.add(f"{number}", "d", f"{number}", record)
    return Trace.open(path)


class Foreseeing(Predictor):
    """Cheats: the logits are the target router's own, times ``sharpness``, plus noise that the place decides."""

    recipe = Recipe(category="training-free", sees="nothing", source="a test")

    def __init__(self, topology: Topology, horizons: tuple[int, ...], sharpness: float, noise: float = 0.0) -> None:
        super().__init__(topology, horizons)
        self.sharpness, self.noise = sharpness, noise

    def forward(self, window: Window) -> Tensor:
        logits = ahead(window.router_BTLE.clamp_min(1e-9).log(), self.horizons)
        return self.sharpness * logits + self.noise * torch.sin(1000 * logits)


class Constant(Predictor):
    """The same logits for every event."""

    recipe = Recipe(category="training-free", sees="nothing", source="a test")

    def __init__(self, topology: Topology, horizons: tuple[int, ...], logits_E: Tensor) -> None:
        super().__init__(topology, horizons)
        self.logits_E = logits_E

    def forward(self, window: Window) -> Tensor:
        return self.logits_E.expand(*window.router_BTLE.shape[:3], len(self.horizons), -1)


# The tally


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_a_tally_holds_the_sums_over_every_event(tmp_path: Path, batch_tokens: int) -> None:
    trace = write(tmp_path / "trace", (9, 4, 23, 2))
    windows = Windows(trace, [2, 0, 3], length=8, context=3)
    predictor = Foreseeing(TOPOLOGY, HORIZONS, 0.5, noise=1.5)
    curves = torch.linspace(0.1, 0.9, 97).expand(TOPOLOGY.layers, len(HORIZONS), -1)
    calibration = Calibration(TOPOLOGY.top_k, torch.full((TOPOLOGY.layers, len(HORIZONS)), 1.7), curves)
    residency = replay(windows, HORIZONS, 3)
    tally = evaluate(predictor, windows, calibration=calibration, residency=residency, batch_tokens=batch_tokens)
    assert tally.documents.tolist() == [0, 2, 3]
    window = windows.batch(slice(0, len(windows)))
    targets, logits = targets_of(window, HORIZONS), predictor(window)
    probability = calibration.apply(logits)
    cold = residency.cold(torch.arange(len(windows)), window, HORIZONS)
    values = event_metrics(logits, probability, targets, TOPOLOGY.top_k, cold)
    assert set(tally.sums) == set(values)
    assert window.phase_BT is not None
    for g, index in enumerate((0, 2, 3)):
        for phase in range(PHASES):
            rows = (window.document_B[:, None] == index) & (window.phase_BT == phase)
            for s in range(TOPOLOGY.layers):
                for h in range(len(HORIZONS)):
                    known = targets.known_BTSH[:, :, s, h] & rows
                    assert tally.events[g, phase, s, h] == known.sum()
                    assert tally.cold[g, phase, s, h] == cold[:, :, s, h][known].sum()
                    assert tally.needed[g, phase, s, h] == (targets.expert_ids_BTSHK[:, :, s, h][known] >= 0).sum()
                    for name in ("recall@K", "gate_mass@K", "cold_recall@2K", "top1", "kl", "brier"):
                        expected = values[name][:, :, s, h][known].double().sum()
                        assert float(tally.sums[name][g, phase, s, h]) == pytest.approx(
                            float(expected), rel=1e-5, abs=1e-5
                        )
        for h in range(len(HORIZONS)):
            known = targets.known_BTSH[..., h] & (window.document_B == index)[:, None, None]
            predicted, observed, count = tally.bins[g, h].sum(0).tolist()
            assert count == known.sum() * TOPOLOGY.experts
            assert predicted == pytest.approx(float(probability[:, :, :, h][known].sum()), rel=1e-5)
            assert observed == targets.routed_BTSHE[:, :, :, h][known].sum()
    recall = values["recall@K"].double()
    for h, value in enumerate(tally.recall()):
        known = targets.known_BTSH[..., h]
        assert value == pytest.approx(float(recall[..., h][known].mean()))


def test_recall_alone_is_the_same_recall(tmp_path: Path) -> None:
    windows = Windows(write(tmp_path / "trace", (9, 4, 23)), range(3), length=8)
    predictor = Foreseeing(TOPOLOGY, HORIZONS, 0.5, noise=1.5)
    whole, part = evaluate(predictor, windows), evaluate(predictor, windows, only_recall=True)
    assert list(part.sums) == ["recall@K"]
    assert torch.equal(part.sums["recall@K"], whole.sums["recall@K"])
    assert torch.equal(part.events, whole.events)


def test_a_tally_survives_being_flat(tmp_path: Path) -> None:
    windows = Windows(write(tmp_path / "trace", (9, 4)), [0, 1], length=8)
    tally = evaluate(Foreseeing(TOPOLOGY, HORIZONS, 1.0), windows)
    again = Tally.of(tally.tensors())
    assert set(again.sums) == set(tally.sums)
    for name, tensor in tally.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def test_one_who_knows_is_perfect_and_an_even_guess_is_chance(tmp_path: Path) -> None:
    windows = Windows(write(tmp_path / "trace", (60, 60, 60)), range(3), length=64)
    # Slots were emptied at random, so the needed experts are still the router's highest.
    assert evaluate(Foreseeing(TOPOLOGY, HORIZONS, 1.0), windows).recall() == [1.0, 1.0, 1.0]
    even = evaluate(Constant(TOPOLOGY, HORIZONS, torch.zeros(6)), windows)
    assert even.recall() == pytest.approx([1 / 3] * 3, abs=0.06)
    assert not evaluate(Foreseeing(TOPOLOGY, HORIZONS, -1.0), windows).sums["recall@K"].any()


def test_dropout_is_off_and_no_gradient_is_kept(tmp_path: Path) -> None:
    class Dropping(Constant):
        def forward(self, window: Window) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(window)

    predictor = Dropping(TOPOLOGY, HORIZONS, torch.zeros(6)).train()
    windows = Windows(write(tmp_path / "trace", (9,)), [0], length=8)
    evaluate(predictor, windows)
    predictor.train()
    fit_calibration(predictor, windows)


@pytest.mark.parametrize("name", [name for name, kind in PREDICTORS.items() if kind.recipe.epochs == 0])
def test_every_training_free_predictor_gives_finite_numbers_on_routing_with_holes(tmp_path: Path, name: str) -> None:
    # No logits, so the router's distribution has exact zeros; slots without an expert; few tokens to count.
    topology = TOPOLOGY.model_copy(update={"experts": 12})
    generator = torch.Generator().manual_seed(1)
    fields = ("token_ids", "phase", "expert_ids", "hidden")
    with TraceWriter(tmp_path / "t", Manifest(topology=topology, source=Source(kind="test"), fields=fields)) as writer:
        for number in range(4):
            ids = torch.rand(12, 3, 12, generator=generator).argsort(-1)[..., :2]
            record = RoutingRecord(
                token_ids=torch.arange(12, dtype=torch.int32) + number,
                phase=torch.zeros(12, dtype=torch.uint8),
                expert_ids=torch.where(torch.rand(ids.shape, generator=generator) < 0.3, -1, ids).to(torch.int16),
                hidden=torch.randn(12, 3, 4, generator=generator).half(),
            )
            writer.add(f"{number}", "d", f"{number}", record)
    trace = Trace.open(tmp_path / "t")
    train, test = Windows(trace, [0, 1, 2], length=8), Windows(trace, [3], length=12)
    weight = torch.randn(3, 12, 4, generator=generator)
    predictor = PREDICTORS[name](topology, HORIZONS)
    predictor.prepare(Knowledge(lambda: train.batches(4), weight, torch.zeros(3, 12)))
    calibration, residency = fit_calibration(predictor, train), replay(test, HORIZONS, 4)
    tally = evaluate(predictor, test, calibration=calibration, residency=residency)
    assert {"cold_recall@K", "cold_recall@2K"} <= set(tally.sums)
    assert float(tally.cold.sum()) > 0
    for metric, sums in tally.sums.items():
        assert torch.isfinite(sums).all(), metric
    assert torch.isfinite(tally.bins).all()


# Intervals


def tally_of(recall_G: Tensor, events_G: Tensor, horizons: int = 1) -> Tally:
    """A tally whose documents have these recalls and numbers of events, the same at every horizon."""
    events = events_G.double().view(-1, 1, 1, 1).expand(-1, PHASES, 1, horizons) / PHASES
    sums = recall_G.double().view(-1, 1, 1, 1) * events
    bins = torch.zeros(len(recall_G), horizons, CALIBRATION_BINS, 3, dtype=torch.float64)
    return Tally(torch.arange(len(recall_G)), {"recall@K": sums}, events, bins)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    trials, documents, truth = 300, 40, 0.6
    covered, widths = 0, []
    for _ in range(trials):
        # Long documents are no better than short ones, so the ratio's expectation is the truth.
        recall = (truth + 0.15 * torch.randn(documents, generator=generator)).clamp(0, 1)
        events = torch.randint(50, 400, (documents,), generator=generator)
        interval = by_horizon(Ratios.of([tally_of(recall, events)], "recall@K"), [1])[1]
        covered += interval.low <= truth <= interval.high
        widths.append(interval.high - interval.low)
    # 95 % less what a bootstrap over 40 documents misses, and three standard errors of 300 trials.
    assert 0.90 <= covered / trials <= 0.985
    assert 0.07 < sum(widths) / trials < 0.13


def test_paired_intervals_cover_a_known_difference_and_are_narrower_than_unpaired_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    covered, trials = 0, 300
    for _ in range(trials):
        events = torch.randint(50, 400, (40,), generator=generator)
        hard = 0.2 * torch.randn(40, generator=generator)
        ours = Ratios.of([tally_of(0.5 + hard + 0.03 * torch.randn(40, generator=generator), events)], "recall@K")
        theirs = Ratios.of([tally_of(0.48 + hard + 0.03 * torch.randn(40, generator=generator), events)], "recall@K")
        difference = paired_difference(ours, theirs, [1])[1]
        alone = by_horizon(ours, [1])[1]
        covered += difference.low <= 0.02 <= difference.high
        assert difference.high - difference.low < 0.5 * (alone.high - alone.low)
    assert 0.90 <= covered / trials <= 0.985


def test_a_predictor_does_not_differ_from_itself() -> None:
    generator = torch.Generator().manual_seed(2)
    recall, events = torch.rand(20, generator=generator), torch.randint(1, 90, (20,), generator=generator)
    own = Ratios.of([tally_of(recall, events)], "recall@K")
    assert paired_difference(own, own, [3]) == {3: Interval(value=0.0, low=0.0, high=0.0)}


def test_differences_change_sign_with_the_order() -> None:
    generator = torch.Generator().manual_seed(3)
    events = torch.randint(1, 90, (20,), generator=generator)
    one, other = (Ratios.of([tally_of(torch.rand(20, generator=generator), events)], "recall@K") for _ in range(2))
    forth, back = paired_difference(one, other, [1])[1], paired_difference(other, one, [1])[1]
    assert (forth.value, forth.low, forth.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_seeds_widen_an_interval() -> None:
    # Every document has the same recall within a seed: all that varies is the seed.
    events = torch.full((30,), 10)
    seeds = [tally_of(torch.full((30,), value), events) for value in (0.4, 0.5, 0.6)]
    interval = by_horizon(Ratios.of(seeds, "recall@K"), [1])[1]
    assert interval.value == pytest.approx(0.5)
    assert (interval.low, interval.high) == pytest.approx((0.4, 0.6), abs=0.035)
    same = by_horizon(Ratios.of([seeds[1]] * 3, "recall@K"), [1])[1]
    assert (same.low, same.high) == pytest.approx((0.5, 0.5))


def test_seeds_over_one_document_are_no_interval() -> None:
    """Three seeds that agree on one document settle nothing about another one."""
    ours, theirs = (
        Ratios(torch.tensor([[[5.0 + s]], [[5.1 + s]], [[5.3 + s]]]).double(), torch.tensor([[10.0]]).double())
        for s in (1, 0)
    )
    (difference,) = paired_difference(ours, theirs, (1,)).values()
    assert difference == Interval(value=0.1, low=0.1, high=0.1)
    (recall,) = by_horizon(ours, (1,)).values()
    assert recall.low == recall.value == recall.high == pytest.approx(0.613333)
    bins = torch.zeros(1, 1, CALIBRATION_BINS, 3, dtype=torch.float64)
    tallies = [Tally(torch.tensor([0]), bins=bins.clone()) for _ in range(3)]
    for seed, tally in enumerate(tallies):
        tally.bins[0, 0, 2] = torch.tensor([3.0, 4.0 + seed, 10.0])
    (error,) = expected_calibration_error(tallies, (1,)).values()
    assert error == Interval(value=0.2, low=0.2, high=0.2)


def test_documents_count_by_their_events() -> None:
    ratios = Ratios.of([tally_of(torch.tensor([1.0, 0.0]), torch.tensor([30, 10]))], "recall@K")
    assert float(ratios.estimate()) == pytest.approx(0.75)
    assert set(ratios.draws()[:, 0].tolist()) == {0.0, 0.75, 1.0}
    of_one = Ratios.of(
        [tally_of(torch.tensor([1.0, 0.0]), torch.tensor([30, 10]))], "recall@K", torch.tensor([False, True])
    )
    assert by_horizon(of_one, [1]) == {1: Interval(value=0.0, low=0.0, high=0.0)}


def test_a_phase_by_itself() -> None:
    tally = tally_of(torch.tensor([0.5, 0.5]), torch.tensor([10, 10]))
    tally.events = tally.events.clone()
    tally.events[:, 1] = 0
    tally.sums["recall@K"] = tally.sums["recall@K"] * torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    assert by_horizon(Ratios.of([tally], "recall@K", phase=0), [1])[1].value == pytest.approx(0.5)
    assert by_horizon(Ratios.of([tally], "recall@K", phase=1), [1]) == {}


def test_an_interval_holds_its_estimate_and_passes_over_draws_without_an_event() -> None:
    draws = torch.linspace(0, 1, 1001, dtype=torch.float64)
    middle = interval_of(0.5, draws)
    assert (middle.value, middle.low, middle.high) == pytest.approx((0.5, 0.025, 0.975))
    assert interval_of(2.0, draws).high == 2.0
    assert interval_of(-1.0, draws).low == -1.0
    holes = torch.cat([draws, torch.full((500,), math.nan, dtype=torch.float64)])
    assert interval_of(0.5, holes) == interval_of(0.5, draws)
    assert interval_of(0.5, holes[-3:]) == Interval(value=0.5, low=0.5, high=0.5)


def test_resampling_draws_with_replacement_and_always_the_same() -> None:
    weights = resampled(7)
    assert weights.shape[1] == 7
    assert (weights.sum(1) == 7).all()
    assert weights.mean(0).tolist() == pytest.approx([1.0] * 7, abs=0.1)
    assert weights.var(0).tolist() == pytest.approx([6 / 7] * 7, abs=0.15)
    assert torch.equal(weights, resampled(7))
    assert not torch.equal(weights, resampled(7, salt=1))


# Where there is no event


def test_what_was_never_asked_is_left_out(tmp_path: Path) -> None:
    # Documents of two tokens and one layer: from horizon 2 on there is nothing to foresee.
    topology = TOPOLOGY.model_copy(update={"layers": 1})
    trace = write(tmp_path / "trace", (2, 2, 1), topology)
    predictor = Constant(topology, (1, 2), torch.zeros(6))
    tally = evaluate(predictor, Windows(trace, range(3), length=8))
    assert float(tally.events[..., 1].sum()) == 0
    assert list(by_horizon(Ratios.of([tally], "recall@K"), (1, 2))) == [1]
    assert list(paired_difference(Ratios.of([tally], "kl"), Ratios.of([tally], "kl"), (1, 2))) == [1]
    assert list(expected_calibration_error([tally], (1, 2))) == [1]
    assert reliability([tally], (1, 2))[2] == ()
    assert [row[1] for row in recall_by_layer([tally])] == [None]
    assert [row[1] for row in sums_by_document([tally])["recall@K"][0]] == [0.0] * 3
    assert [row[1] for row in documents_of(tally, ["a", "b", "c"]).events] == [0] * 3


def test_recall_by_layer_and_document_are_their_shares() -> None:
    sums = torch.arange(12.0, dtype=torch.float64).view(2, 2, 3, 1)
    events = torch.full((2, 2, 3, 1), 20.0, dtype=torch.float64)
    bins = torch.zeros(2, 1, CALIBRATION_BINS, 3, dtype=torch.float64)
    one = Tally(torch.arange(2), {"recall@K": sums}, events, bins)
    other = Tally(torch.arange(2), {"recall@K": 3 * sums}, events, bins)
    assert [row[0] for row in recall_by_layer([one])] == pytest.approx([18 / 80, 22 / 80, 26 / 80])
    assert [row[0] for row in recall_by_layer([one, other])] == pytest.approx([36 / 80, 44 / 80, 52 / 80])
    assert sums_by_document([one, other]) == {"recall@K": (((15.0,), (51.0,)), ((45.0,), (153.0,)))}
    assert documents_of(one, ["first", "second"]) == TestDocuments(ids=("first", "second"), events=((120,), (120,)))


# Calibration


def test_one_who_is_right_as_often_as_he_says_has_no_calibration_error() -> None:
    bins = torch.zeros(4, 1, CALIBRATION_BINS, 3, dtype=torch.float64)
    for row in range(CALIBRATION_BINS):
        share = (row + 0.5) / CALIBRATION_BINS
        bins[:, 0, row] = torch.tensor([share * 100, share * 100, 100.0])
    perfect = Tally(torch.arange(4), {}, torch.ones(4, 2, 1, 1), bins)
    assert expected_calibration_error([perfect], [1]) == {1: Interval(value=0.0, low=0.0, high=0.0)}
    curve = reliability([perfect], [1])[1]
    assert [point.predicted for point in curve] == pytest.approx([point.observed for point in curve])
    assert [point.count for point in curve] == [400] * CALIBRATION_BINS
    shifted = bins.clone()
    shifted[..., 1] *= 0.5
    error = expected_calibration_error([Tally(torch.arange(4), {}, perfect.events, shifted)], [1])[1]
    assert error.value == pytest.approx(0.25)


def test_a_perfectly_calibrated_construction() -> None:
    # The outcome is drawn from the probabilities themselves, in place of the trace's targets.
    generator = torch.Generator().manual_seed(5)
    logits = 1.5 * torch.randn(30_000, 8, generator=generator)
    probability = inclusion_probabilities(logits, 2)
    observed = (torch.rand(probability.shape, generator=generator) < probability).double()
    index = (probability * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)

    def tally(predicted: Tensor) -> Tally:
        bins = torch.zeros(10, 1, CALIBRATION_BINS, 3, dtype=torch.float64)
        group = (torch.arange(30_000) // 3000)[:, None].expand_as(index)
        row = (predicted * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
        for column, values in enumerate((predicted.double(), observed, torch.ones_like(observed))):
            bins[:, 0, :, column].index_put_((group, row), values, accumulate=True)
        return Tally(torch.arange(10), {}, torch.ones(10, 2, 1, 1), bins)

    honest = expected_calibration_error([tally(probability)], [1])[1]
    boastful = expected_calibration_error([tally(inclusion_probabilities(3 * logits, 2))], [1])[1]
    assert honest.value < 0.006
    assert boastful.value > 5 * honest.high
