"""What every predictor of the registry must keep, and what each of the nine must be."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from specmoe.dataset import Window, routed_of
from specmoe.errors import SpecmoeError
from specmoe.latency import observations_of
from specmoe.predictors.base import Knowledge, Predictor, parameter_count
from specmoe.predictors.catalogue import catalogue
from specmoe.predictors.registry import PREDICTORS, select
from specmoe.suite.causality import future_of, largest_leak, with_other_future
from specmoe.topology import REFERENCE, Topology

SMALL = Topology(model_id="small", layers=5, experts=8, top_k=2, hidden_size=24)
HORIZONS = (1, 3, 7)

# Bounds of the parameter count at the reference topology, and the order of size.
SIZES = {
    "TinySpeculationModel": (16_150, 17_850),
    "SmallSpeculationModel": (36_100, 39_900),
    "RegularizedSpeculationModel": (200_000, 260_000),
    "ImprovedPredictor": (300_000, 390_000),
    "HierarchicalGatingPredictor": (400_000, 520_000),
    "ContextualGatingPredictor": (500_000, 650_000),
    "LayerSpecificPredictor": (600_000, 780_000),
    "TransformerGatingPredictor": (800_000, 1_040_000),
    "HierarchicalEnsemble": (1_000_000, 1_300_000),
}


def make_window(
    seed: int, *, tokens: int = 40, batch: int = 2, hidden: bool = True, topology: Topology = SMALL
) -> Window:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, topology.layers)
    logits = 2 * torch.randn(*shape, topology.experts, generator=generator)
    ids = logits.topk(topology.top_k, -1).indices
    return Window(
        token_ids_BT=torch.randint(50, (batch, tokens), generator=generator),
        valid_BT=torch.ones(batch, tokens, dtype=torch.bool),
        scored_BT=torch.ones(batch, tokens, dtype=torch.bool),
        expert_ids_BTLK=ids,
        routed_BTLE=routed_of(ids, topology.experts),
        router_BTLE=logits.softmax(-1),
        hidden_BTLD=torch.randn(*shape, topology.hidden_size, generator=generator) if hidden else None,
        soft=True,
        document_B=torch.arange(batch),
        phase_BT=torch.zeros(batch, tokens, dtype=torch.long),
    )


def prepared(name: str, *, hidden: bool = True, topology: Topology = SMALL) -> Predictor:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(topology.layers, topology.experts, topology.hidden_size, generator=generator)
    windows = [make_window(seed, hidden=hidden, topology=topology) for seed in (1, 2, 3)]
    knowledge = Knowledge(lambda: windows, weight, torch.zeros(topology.layers, topology.experts))
    predictor = PREDICTORS[name](topology, HORIZONS)
    predictor.prepare(knowledge)
    with torch.no_grad():
        for parameter in predictor.parameters():
            # Away from the start, where many parameters are zero and would hide a leak.
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) / max(1, parameter.shape[-1]) ** 0.5)
    return predictor.eval()


def runs_without_hidden(name: str) -> bool:
    return not PREDICTORS[name].recipe.needs & {"hidden", "routers"}


@pytest.mark.parametrize("name", PREDICTORS)
def test_step_agrees_with_forward(name: str) -> None:
    predictor, window = prepared(name), make_window(4, batch=1)
    with torch.no_grad():
        expected = predictor(window)[0].flatten(0, 1)
    state = predictor.start()
    stepped = torch.stack([predictor.step(state, observation) for observation in observations_of(window)])
    assert expected.shape == (40 * SMALL.layers, len(HORIZONS), SMALL.experts)
    torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in PREDICTORS if prepared(name).compiled() is not None])
def test_a_compiled_step_agrees_with_forward(name: str) -> None:
    predictor, window = prepared(name), make_window(4, batch=1)
    with torch.no_grad():
        expected = predictor(window)[0].flatten(0, 1)
    compiled = predictor.compiled()
    assert compiled is not None
    # Twice, as nothing of one sequence may be left over for the next.
    for _ in range(2):
        state = compiled.start()
        stepped = [torch.from_numpy(compiled.step(state, observation)) for observation in observations_of(window)]
        torch.testing.assert_close(torch.stack(stepped), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [SMALL.hidden_size, 0])  # 0: the trace does not even say how wide they were
@pytest.mark.parametrize("name", [name for name in PREDICTORS if runs_without_hidden(name)])
def test_step_agrees_with_forward_without_hidden_states(name: str, width: int) -> None:
    topology = SMALL.model_copy(update={"hidden_size": width})
    predictor = prepared(name, hidden=False, topology=topology)
    window = make_window(4, batch=1, tokens=20, hidden=False, topology=topology)
    with torch.no_grad():
        expected = predictor(window)[0].flatten(0, 1)
    state = predictor.start()
    stepped = torch.stack([predictor.step(state, observation) for observation in observations_of(window)])
    torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize(("token", "layer"), [(0, 0), (17, 2), (30, 4)])
def test_what_is_not_known_changes_nothing(name: str, token: int, layer: int) -> None:
    predictor, window, other = prepared(name), make_window(5), make_window(6)
    changed = with_other_future(window, other, (token, layer))
    future_TL = future_of((token, layer), 40, SMALL.layers).places_TL
    with torch.no_grad():
        before, after = predictor(window), predictor(changed)
    torch.testing.assert_close(before[:, ~future_TL], after[:, ~future_TL], rtol=1e-5, atol=1e-5)
    # The same for another future of whatever kind, that of a run's own trace.
    assert largest_leak(predictor, window, [(token, layer)]) <= 1e-5
    if name not in {"LayerFrequency"}:
        assert not torch.equal(before[:, future_TL], after[:, future_TL])


@pytest.mark.parametrize("name", PREDICTORS)
def test_weights_survive_a_file(name: str, tmp_path) -> None:
    predictor, window = prepared(name), make_window(7)
    save_file({k: v.contiguous().clone() for k, v in predictor.state_dict().items()}, tmp_path / "weights.safetensors")
    again = PREDICTORS[name](SMALL, HORIZONS)
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(window), predictor(window))


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize(
    "topology",
    [
        Topology(model_id="one layer", layers=1, experts=4, top_k=1, hidden_size=8),
        Topology(model_id="all experts", layers=2, experts=3, top_k=3, hidden_size=8),
        Topology(model_id="wide", layers=2, experts=40, top_k=6, hidden_size=8),
    ],
    ids=lambda topology: topology.model_id,
)
def test_unusual_topologies(name: str, topology: Topology) -> None:
    predictor = prepared(name, topology=topology)
    with torch.no_grad():
        logits = predictor(make_window(8, tokens=6, topology=topology))
    assert logits.shape == (2, 6, topology.layers, len(HORIZONS), topology.experts)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_fully_padded_window_gives_finite_logits(name: str) -> None:
    window = make_window(9, tokens=12)
    empty = dataclasses.replace(
        window,
        valid_BT=torch.zeros_like(window.valid_BT),
        scored_BT=torch.zeros_like(window.scored_BT),
        expert_ids_BTLK=torch.full_like(window.expert_ids_BTLK, -1),
        routed_BTLE=torch.zeros_like(window.routed_BTLE),
        router_BTLE=torch.zeros_like(window.router_BTLE),
    )
    with torch.no_grad():
        assert torch.isfinite(prepared(name)(empty)).all()


def test_sizes_at_the_reference_topology() -> None:
    counts = {name: parameter_count(PREDICTORS[name](REFERENCE)) for name in SIZES}
    for name, (least, most) in SIZES.items():
        assert least <= counts[name] <= most, (name, counts[name])
    assert list(counts.values()) == sorted(counts.values())


def test_every_learned_predictor_uses_every_parameter() -> None:
    for name in SIZES:
        torch.manual_seed(0)
        predictor, window = prepared(name), make_window(10)
        predictor(window).square().sum().backward()
        silent = [
            key
            for key, parameter in predictor.named_parameters()
            # Stand-ins for missing router inputs have nothing to do where none is missing.
            if "missing" not in key and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
        ]
        assert silent == [], (name, silent)


def test_the_ensemble_calls_and_weighs_its_members() -> None:
    predictor, window = prepared("HierarchicalEnsemble"), make_window(11)
    with torch.no_grad():
        before = predictor(window)
        for member in predictor.members:
            kept = {key: value.clone() for key, value in member.state_dict().items()}
            for parameter in member.parameters():
                parameter.add_(1.0)
            assert not torch.allclose(predictor(window), before)
            member.load_state_dict(kept)
        torch.testing.assert_close(predictor(window), before)


def test_layers_of_the_layer_specific_predictor_share_no_head() -> None:
    predictor, window = prepared("LayerSpecificPredictor"), make_window(12)
    with torch.no_grad():
        before = predictor(window)
        predictor.hidden.weight[3].zero_()
        after = predictor(window)
    changed = (before != after).flatten(3).any(-1).any(0).any(0)
    assert changed.tolist() == [False, False, False, True, False]


def test_learned_predictors_without_training_data_for_hidden_say_what_they_miss() -> None:
    knowledge = Knowledge(lambda: [make_window(1, hidden=False)])
    with pytest.raises(SpecmoeError, match="hidden"):
        PREDICTORS["Ridge"](SMALL).prepare(knowledge)
    with pytest.raises(SpecmoeError, match="router"):
        PREDICTORS["NextRouter"](SMALL).prepare(knowledge)


def test_horizons_must_be_positive() -> None:
    for horizons in ((), (0,), (-1, 2)):
        with pytest.raises(SpecmoeError, match="horizons"):
            PREDICTORS["TinySpeculationModel"](SMALL, horizons)


def test_select_by_pattern_and_by_mistake() -> None:
    assert select(["Tiny*"]) == ["TinySpeculationModel"]
    assert select() == list(PREDICTORS)
    with pytest.raises(SpecmoeError, match="did you mean TinySpeculationModel"):
        select(["TinySpeculationModell"])


def test_the_catalogue_lists_the_registry() -> None:
    entries = {entry.name: entry for entry in catalogue()}
    assert list(entries) == list(PREDICTORS)
    for name, entry in entries.items():
        assert entry.source
        assert entry.reference_parameters == parameter_count(PREDICTORS[name](REFERENCE))
    categories = [entries[name].category for name in SIZES]
    assert sorted(set(categories)) == ["attention-based", "edge", "ensemble", "multi-scale"]
