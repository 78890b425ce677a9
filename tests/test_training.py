"""The training loop: what it reaches, that it can be interrupted anywhere, and what it does when things go wrong."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specmoe.dataset import Window, Windows, ahead, sharpen, split_documents, targets_of
from specmoe.errors import SpecmoeError
from specmoe.evaluation import evaluate
from specmoe.predictors.base import Knowledge, Predictor, Recipe
from specmoe.predictors.registry import PREDICTORS
from specmoe.predictors.regularized import RegularizedSpeculationModel
from specmoe.sources.synthetic import optimal_recall
from specmoe.suite.data import with_shuffled_hidden
from specmoe.topology import Topology
from specmoe.trace import Trace
from specmoe.training import EpochReport, FitResult, TrainingFailed, fit, loss_of, training_target

HORIZONS = (1, 3)
LEARNED = [name for name, kind in PREDICTORS.items() if kind.recipe.epochs > 0]
DETERMINISM, SEED = 0.8, 3  # of the trace ``synthetic_path``


@dataclasses.dataclass(frozen=True)
class Parts:
    topology: Topology
    train: Windows
    validation: Windows
    test: Windows
    knowledge: Knowledge


@pytest.fixture(scope="module")
def parts(synthetic_path: Path) -> Parts:
    trace = Trace.open(synthetic_path)
    split = split_documents(trace.documents)
    train = Windows(trace, split.parts["train"], length=8)
    validation, test = (Windows(trace, split.parts[name], length=48) for name in ("validation", "test"))
    routers = torch.zeros(4, 8, 16), torch.zeros(4, 8)
    return Parts(trace.topology, train, validation, test, Knowledge(functools.partial(train.batches, 32), *routers))


def variant(kind: type[Predictor], **changes: Any) -> type[Predictor]:
    """The same predictor under another recipe."""
    return type(kind.__name__, (kind,), {"recipe": dataclasses.replace(kind.recipe, **changes)})


def altered(windows: Windows, **tensors: Tensor | None) -> Windows:
    """The same windows with other tensors."""
    other = object.__new__(Windows)
    vars(other).update(vars(windows) | tensors)
    return other


def train(kind: type[Predictor], parts: Parts, *, seed: int = 0, horizons: tuple[int, ...] = HORIZONS, **options: Any):
    torch.manual_seed(seed)
    predictor = kind(parts.topology, horizons)
    return predictor, fit(predictor, parts.train, parts.validation, parts.knowledge, seed=seed, **options)


def same_weights(ours: Predictor, theirs: Predictor) -> bool:
    pairs = zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# What it reaches


def recall_with_error(predictor: Predictor, windows: Windows) -> tuple[Tensor, Tensor]:
    """recall@K at each horizon and its standard error over documents."""
    tally = evaluate(predictor, windows)
    sums, events = tally.sums["recall@K"].sum((1, 2)), tally.events.sum((1, 2))
    by_document = sums / events
    return sums.sum(0) / events.sum(0), by_document.std(0) / len(by_document) ** 0.5


@pytest.mark.parametrize("name", PREDICTORS)
def test_no_predictor_beats_the_known_optimum(parts: Parts, name: str) -> None:
    kind = PREDICTORS[name]
    # Few epochs: it is not the point here how close they come.
    predictor, _ = train(variant(kind, epochs=min(kind.recipe.epochs, 4)), parts)
    recall, error = recall_with_error(predictor, parts.test)
    for h, horizon in enumerate(HORIZONS):
        best = optimal_recall(parts.topology, DETERMINISM, SEED, horizon)
        assert float(recall[h]) < best + 4 * float(error[h]) + 0.005


@pytest.mark.parametrize("name", ["RegularizedSpeculationModel", "TransformerGatingPredictor"])
def test_a_learned_predictor_comes_near_the_known_optimum(parts: Parts, name: str) -> None:
    predictor, result = train(PREDICTORS[name], parts, horizons=(1, 2))
    recall, _ = recall_with_error(predictor, parts.test)
    for h, horizon in enumerate((1, 2)):
        assert float(recall[h]) > optimal_recall(parts.topology, DETERMINISM, SEED, horizon) - 0.05
    assert result.curve[-1].train_loss < result.curve[0].train_loss


def test_inputs_of_other_tokens_are_worth_no_more_than_frequency(parts: Parts) -> None:
    # Every place gets its routing from another document and token, so nothing that is seen tells of it.
    def shuffled(windows: Windows, seed: int) -> Windows:
        generator = torch.Generator().manual_seed(seed)
        changed: dict[str, Tensor] = {
            name: getattr(windows, name).clone() for name in ("hidden", "router", "routed", "expert_ids", "token_ids")
        }
        rows = windows.valid.flatten().nonzero()[:, 0]
        for layer in range(windows.topology.layers):
            order = rows[torch.randperm(len(rows), generator=generator)]
            for name in ("hidden", "router", "routed", "expert_ids"):
                values = changed[name].flatten(0, 1)
                values[rows, layer] = values[order, layer]
        return altered(windows, **changed)

    scrambled = Parts(
        parts.topology,
        shuffled(parts.train, 0),
        shuffled(parts.validation, 1),
        shuffled(parts.test, 2),
        Knowledge(functools.partial(shuffled(parts.train, 0).batches, 32)),
    )
    chance = recall_with_error(train(PREDICTORS["LayerFrequency"], scrambled)[0], scrambled.test)[0]
    for name in ("Ridge", "RegularizedSpeculationModel", "LayerSpecificPredictor"):
        recall, error = recall_with_error(train(PREDICTORS[name], scrambled)[0], scrambled.test)
        assert ((recall - chance).abs() < 4 * error + 0.02).all(), name


def test_shuffled_hidden_states_leave_ridge_with_frequency(parts: Parts) -> None:
    shuffled = with_shuffled_hidden(parts.train)
    knowledge = Knowledge(functools.partial(shuffled.batches, 32))
    recalls = {}
    for name in ("Ridge", "LayerFrequency"):
        predictor = PREDICTORS[name](parts.topology, HORIZONS)
        predictor.prepare(knowledge)
        recalls[name], _ = recall_with_error(predictor, with_shuffled_hidden(parts.test, seed=1))
    assert (recalls["Ridge"] - recalls["LayerFrequency"]).abs().max() < 0.04


# Interruption


def dropping_out(scheduler: str) -> type[Predictor]:
    # A large rate, so that the plateau scheduler has something to react to within few epochs.
    return variant(RegularizedSpeculationModel, scheduler=scheduler, epochs=6, batch_windows=16, learning_rate=2e-2)


class Interrupted(Exception):
    pass


def interrupt_after(epoch: int) -> Callable[[EpochReport], None]:
    def on_epoch(report: EpochReport) -> None:
        if report.epoch == epoch:
            raise Interrupted

    return on_epoch


@pytest.mark.parametrize("scheduler", ["cosine", "plateau"])
@pytest.mark.parametrize("stops", [(1,), (2,), (3, 5)])
def test_an_interrupted_run_ends_as_one_that_ran_through(
    parts: Parts, tmp_path: Path, scheduler: str, stops: tuple[int, ...]
) -> None:
    kind = dropping_out(scheduler)
    whole, whole_result = train(kind, parts)
    assert len({report.learning_rate for report in whole_result.curve}) > 1
    path = tmp_path / "checkpoint"
    for stop in stops:
        with pytest.raises(Interrupted):
            train(kind, parts, checkpoint=path, on_epoch=interrupt_after(stop))
    # Whatever else draws random numbers in between must not matter.
    torch.rand(17)
    seen: list[int] = []
    again, result = train(kind, parts, checkpoint=path, on_epoch=lambda report: seen.append(report.epoch))
    assert seen[0] == stops[-1]
    assert same_weights(again, whole)
    assert result.curve == whole_result.curve
    assert (result.best_epoch, result.stopped) == (whole_result.best_epoch, whole_result.stopped)


@pytest.mark.parametrize("name", LEARNED)
def test_every_learned_predictor_continues_exactly(parts: Parts, tmp_path: Path, name: str) -> None:
    kind = variant(PREDICTORS[name], epochs=2)
    whole, whole_result = train(kind, parts)
    with pytest.raises(Interrupted):
        train(kind, parts, checkpoint=tmp_path / "checkpoint", on_epoch=interrupt_after(2))
    again, result = train(kind, parts, checkpoint=tmp_path / "checkpoint")
    assert same_weights(again, whole)
    assert result.curve == whole_result.curve


def test_an_interrupt_within_an_epoch_loses_that_epoch_only(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = dropping_out("cosine")
    whole, whole_result = train(kind, parts)
    batches, begun = Windows.batches, 0

    def failing(self: Windows, size: int, generator: torch.Generator | None = None):
        nonlocal begun
        begun += generator is not None
        for number, window in enumerate(batches(self, size, generator)):
            if generator is not None and begun == 3 and number == 1:
                raise KeyboardInterrupt
            yield window

    monkeypatch.setattr(Windows, "batches", failing)
    with pytest.raises(KeyboardInterrupt):
        train(kind, parts, checkpoint=tmp_path / "checkpoint")
    monkeypatch.setattr(Windows, "batches", batches)
    again, result = train(kind, parts, checkpoint=tmp_path / "checkpoint")
    assert same_weights(again, whole)
    assert result.curve == whole_result.curve


def test_a_run_that_was_done_is_not_trained_again(parts: Parts, tmp_path: Path) -> None:
    kind = dropping_out("plateau")
    whole, _ = train(kind, parts, checkpoint=tmp_path / "checkpoint")
    seen: list[int] = []
    again, result = train(kind, parts, checkpoint=tmp_path / "checkpoint", on_epoch=lambda r: seen.append(r.epoch))
    assert seen == []
    assert same_weights(again, whole)
    assert len(result.curve) == 6


def test_the_same_seed_gives_the_same_weights_and_another_one_others(parts: Parts) -> None:
    kind = variant(RegularizedSpeculationModel, epochs=2)
    first, _ = train(kind, parts)
    torch.rand(3)
    second, _ = train(kind, parts)
    assert same_weights(first, second)
    assert not same_weights(first, train(kind, parts, seed=1)[0])


def test_a_damaged_checkpoint_is_an_error_for_the_user(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(b"half a checkpoint")
    with pytest.raises(SpecmoeError, match="damaged"):
        train(dropping_out("cosine"), parts, checkpoint=tmp_path / "checkpoint")


# Numbers that are none


def with_nan(windows: Windows, name: str) -> Windows:
    tensor = getattr(windows, name).clone()
    tensor[len(tensor) // 2, 0, 0, 0] = math.nan
    return altered(windows, **{name: tensor})


@pytest.mark.parametrize("name", ["hidden", "router"])
def test_what_is_not_a_number_ends_the_run_and_is_named(parts: Parts, name: str) -> None:
    broken = dataclasses.replace(parts, train=with_nan(parts.train, name))
    with pytest.raises(TrainingFailed, match=f"^{name} in the trace holds NaN"):
        train(RegularizedSpeculationModel, broken)


def test_a_validation_loss_that_is_not_a_number_ends_the_run_too(parts: Parts) -> None:
    broken = dataclasses.replace(parts, validation=with_nan(parts.validation, "hidden"))
    with pytest.raises(TrainingFailed, match="hidden"):
        train(variant(RegularizedSpeculationModel, epochs=2), broken)


@pytest.mark.parametrize("rate", [1e3, 1e12, 1e30])
@pytest.mark.parametrize("epochs", [1, 3])
def test_an_absurd_learning_rate_fails_or_gives_finite_numbers(parts: Parts, rate: float, epochs: int) -> None:
    # All windows in one batch: nothing follows the only step of the last epoch.
    kind = variant(RegularizedSpeculationModel, learning_rate=rate, epochs=epochs, batch_windows=10_000)
    predictor, result, failure = kind(parts.topology, HORIZONS), FitResult(), ""
    try:
        predictor, result = train(kind, parts)
    except TrainingFailed as error:
        failure = str(error)
    if failure or rate == 1e30:
        assert "lower the rate" in failure
        assert "\n" not in failure
    else:
        assert len(result.curve) == epochs
    assert all(math.isfinite(value) for report in result.curve for value in vars(report).values())
    assert all(torch.isfinite(tensor).all() for tensor in predictor.state_dict().values())


def test_windows_in_which_nothing_can_be_foreseen_are_an_error_for_the_user(parts: Parts) -> None:
    with pytest.raises(SpecmoeError, match="horizon"):
        train(variant(RegularizedSpeculationModel, epochs=1), parts, horizons=(8 * 4,))


# Stopping


class Scripted(Predictor):
    """Trains a weight that nobody needs; its validation loss follows a script."""

    recipe = Recipe(category="edge", sees="nothing", source="a test", epochs=9, patience=3, soft_targets=False)
    script = (3.0, 2.0, 2.5, 1.0, 1.5, 1.2, 1.1, 0.5, 0.4)

    def __init__(self, topology: Topology, horizons: tuple[int, ...]) -> None:
        super().__init__(topology, horizons)
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))
        self.was_training = False

    def forward(self, window: Window) -> Tensor:
        if self.training and not self.was_training:
            self.epoch += 1
        self.was_training = self.training
        shape = (*window.router_BTLE.shape[:3], len(self.horizons), self.topology.experts)
        if self.training:
            return self.weight.expand(shape)
        # The first K experts get logits that cost just what the script says, whichever experts are needed.
        return torch.zeros(shape) + self.script[int(self.epoch) - 1] * (torch.arange(shape[-1]) % 2)


def test_patience_ends_a_run_and_the_best_epochs_weights_are_kept(parts: Parts) -> None:
    predictor, result = train(Scripted, parts)
    losses = [report.validation_loss for report in result.curve]
    assert sorted(range(7), key=lambda e: losses[e]) == sorted(range(7), key=lambda e: Scripted.script[e])
    assert [report.epoch for report in result.curve] == [1, 2, 3, 4, 5, 6, 7]
    assert result.best_epoch == 4
    assert int(predictor.state_dict()["epoch"]) == 4
    assert "3 epochs" in result.stopped
    assert not predictor.training


def test_patience_counts_on_after_an_interruption(parts: Parts, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    for stop in (3, 6, 7):
        with pytest.raises(Interrupted):
            train(Scripted, parts, checkpoint=path, on_epoch=interrupt_after(stop))
    predictor, result = train(Scripted, parts, checkpoint=path)
    assert (len(result.curve), result.best_epoch, int(predictor.state_dict()["epoch"])) == (7, 4, 4)


def test_the_weights_of_the_best_epoch_give_its_validation_numbers(parts: Parts) -> None:
    predictor, result = train(dropping_out("plateau"), parts)
    best = min(result.curve, key=lambda report: report.validation_loss)
    assert result.best_epoch == best.epoch
    tally = evaluate(predictor, parts.validation)
    recall = float(tally.sums["recall@K"].sum() / tally.events.sum())
    assert recall == pytest.approx(best.validation_recall, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in PREDICTORS if name not in LEARNED])
def test_training_free_predictors_need_no_epoch(parts: Parts, tmp_path: Path, name: str) -> None:
    def never(_: EpochReport) -> None:
        raise AssertionError

    predictor, result = train(PREDICTORS[name], parts, checkpoint=tmp_path / "checkpoint", on_epoch=never)
    assert dataclasses.replace(result, seconds=0.0) == FitResult()
    assert result.seconds >= 0
    assert not (tmp_path / "checkpoint").exists()
    again = PREDICTORS[name](parts.topology, HORIZONS)
    again.prepare(parts.knowledge)
    assert same_weights(predictor, again)


# The ingredients


def test_hard_targets_are_smoothed(parts: Parts) -> None:
    window = parts.train.batch(slice(0, 4))
    recipe = dataclasses.replace(RegularizedSpeculationModel.recipe, label_smoothing=0.1)
    target, known = training_target(window, HORIZONS, recipe, None)
    needed = targets_of(window, HORIZONS).routed_BTSHE.bool()
    assert torch.equal(known, targets_of(window, HORIZONS).known_BTSH)
    assert known.any()
    assert torch.allclose(target[known][needed[known]], torch.tensor(0.9 / 2 + 0.1 / 8))
    assert torch.allclose(target[known][~needed[known]], torch.tensor(0.1 / 8))
    torch.testing.assert_close(target[known].sum(-1), torch.ones(int(known.sum())))
    plain, _ = training_target(window, HORIZONS, dataclasses.replace(recipe, label_smoothing=0.0), None)
    assert set(plain[known].unique().tolist()) == {0.0, 0.5}


def test_soft_targets_are_the_routers_distribution_at_a_temperature(parts: Parts) -> None:
    window = parts.train.batch(slice(0, 4))
    target, known = training_target(window, HORIZONS, RegularizedSpeculationModel.recipe, 2.5)
    expected = sharpen(targets_of(window, HORIZONS).router_BTSHE, 2.5)
    torch.testing.assert_close(target[known], expected[known])
    torch.testing.assert_close(target[known].sum(-1), torch.ones(int(known.sum())))
    assert torch.equal(known, targets_of(window, HORIZONS).known_BTSH)


@pytest.mark.parametrize("temperature", [None, 2.5])
def test_the_loss_is_the_mean_cross_entropy_of_what_is_known(parts: Parts, temperature: float | None) -> None:
    window = parts.train.batch(slice(0, 4))
    target, known = training_target(window, HORIZONS, RegularizedSpeculationModel.recipe, temperature)
    logits = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    loss, count = loss_of(logits, target, known, temperature)
    each = -(target * (logits / (temperature or 1.0)).log_softmax(-1)).sum(-1)
    assert count == int(known.sum())
    torch.testing.assert_close(loss, each[known].mean())
    nothing, none = loss_of(logits, target, torch.zeros_like(known), temperature)
    assert (float(nothing), none) == (0.0, 0)


def test_at_temperature_one_the_best_prediction_is_the_routers_distribution(parts: Parts) -> None:
    window = parts.train.batch(slice(0, 4))
    target, known = training_target(window, (1,), RegularizedSpeculationModel.recipe, 2.5)
    logits = ahead(window.router_BTLE.clamp_min(1e-9).log(), (1,)).requires_grad_()
    loss, _ = loss_of(logits, target, known, 2.5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6


def observed_steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Gradient norms before clipping and after, and learning rates, of every optimizer step."""
    seen: dict[str, list[Any]] = {"clip": [], "norm": [], "rate": [], "decay": [], "soft": []}
    clip, step = nn.utils.clip_grad_norm_, torch.optim.AdamW.step

    def clipping(parameters: Any, limit: float) -> Tensor:
        own = list(parameters)
        norm = clip(own, limit)
        after = torch.stack([p.grad.norm() for p in own if p.grad is not None]).norm()
        seen["clip"].append(limit)
        seen["norm"].append((float(norm), float(after)))
        return norm

    def stepping(self: torch.optim.AdamW, closure: Any = None) -> Any:
        seen["rate"].append(self.param_groups[0]["lr"])
        seen["decay"].append(self.param_groups[0]["weight_decay"])
        return step(self, closure)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clipping)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    return seen


def test_gradients_are_clipped_at_every_step(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = observed_steps(monkeypatch)
    train(variant(RegularizedSpeculationModel, epochs=2, batch_windows=16, clip=0.01, weight_decay=0.125), parts)
    steps = 2 * math.ceil(len(parts.train) / 16)
    assert len(seen["rate"]) == len(seen["norm"]) == steps
    assert set(seen["clip"]) == {0.01}
    assert set(seen["decay"]) == {0.125}
    assert max(before for before, _ in seen["norm"]) > 0.01
    assert all(after <= 0.01001 for _, after in seen["norm"])


def test_the_cosine_falls_at_every_step_to_its_end(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = observed_steps(monkeypatch)
    kind = variant(RegularizedSpeculationModel, epochs=3, batch_windows=16, scheduler="cosine", learning_rate=1e-3)
    _, result = train(kind, parts)
    steps = len(seen["rate"])
    low, high = 2e-5, 1e-3
    expected = [low + (high - low) * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    assert seen["rate"] == pytest.approx(expected)
    assert result.curve[-1].learning_rate == pytest.approx(low)


def test_the_plateau_halves_the_rate_only_when_validation_stalls(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = observed_steps(monkeypatch)
    _, result = train(variant(Scripted, batch_windows=10_000), parts)
    # Stalled after epochs 3, 5, 6 and 7.
    assert seen["rate"] == pytest.approx([2e-3 * factor for factor in (1, 1, 1, 0.5, 0.5, 0.25, 0.125)])
    assert [report.learning_rate for report in result.curve] == pytest.approx(seen["rate"])


def test_windows_a_step_are_the_recipes(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = observed_steps(monkeypatch)
    for windows in (7, len(parts.train)):
        seen["rate"].clear()
        train(variant(RegularizedSpeculationModel, epochs=1, batch_windows=windows), parts)
        assert len(seen["rate"]) == math.ceil(len(parts.train) / windows)


def test_soft_targets_only_where_the_recipe_and_the_trace_have_them(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    import specmoe.training as training

    seen: list[float | None] = []

    def watched(window: Window, horizons: Any, recipe: Recipe, temperature: float | None) -> tuple[Tensor, Tensor]:
        seen.append(temperature)
        return training_target(window, horizons, recipe, temperature)

    monkeypatch.setattr(training, "training_target", watched)
    kind = variant(RegularizedSpeculationModel, epochs=1, sharpness=0.6)
    train(kind, parts)
    assert set(seen) == {parts.train.router_temperature(0.6)}
    seen.clear()
    train(variant(kind, soft_targets=False), parts)
    assert set(seen) == {None}


@pytest.mark.parametrize("name", LEARNED)
def test_every_learned_predictor_trains_on_a_trace_without_logits(parts: Parts, name: str) -> None:
    def hard(windows: Windows) -> Windows:
        return altered(windows, soft=False, routed=None, router=None)

    without = Parts(
        parts.topology,
        hard(parts.train),
        hard(parts.validation),
        hard(parts.test),
        Knowledge(functools.partial(hard(parts.train).batches, 32), torch.zeros(4, 8, 16), torch.zeros(4, 8)),
    )
    predictor, result = train(variant(PREDICTORS[name], epochs=2), without)
    assert all(math.isfinite(report.validation_loss) for report in result.curve)
    recall, _ = recall_with_error(predictor, without.test)
    # One expert in four by chance.
    assert float(recall[0]) > 0.3


def test_learned_predictors_that_can_do_without_hidden_states_train_without(parts: Parts) -> None:
    def blind(windows: Windows) -> Windows:
        return altered(windows, hidden=None)

    without = Parts(
        parts.topology,
        blind(parts.train),
        blind(parts.validation),
        blind(parts.test),
        Knowledge(functools.partial(blind(parts.train).batches, 32)),
    )
    able = [name for name in LEARNED if "hidden" not in PREDICTORS[name].recipe.needs]
    assert able
    for name in able:
        predictor, _ = train(variant(PREDICTORS[name], epochs=6, batch_windows=8), without)
        recall, _ = recall_with_error(predictor, without.test)
        # One expert in four by chance.
        assert float(recall[0]) > 0.4, name
