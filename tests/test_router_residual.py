"""The router-residual predictor: where it starts, how large it is, and what its lens is good for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specmoe.dataset import Window, routed_of
from specmoe.errors import SpecmoeError
from specmoe.latency import observations_of
from specmoe.predictors.base import Knowledge, parameter_count
from specmoe.predictors.next_router import NextRouter
from specmoe.predictors.router_residual import RouterResidualPredictor
from specmoe.topology import Topology

TOPOLOGY = Topology(model_id="small", layers=4, experts=8, top_k=2, hidden_size=24)
HORIZONS = (1, 2, 4, 6)
IDS = 12


def a_window(seed: int, *, tokens: int = 20, batch: int = 3) -> Window:
    """Random routing; the last layer's hidden state tells which id comes next."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, TOPOLOGY.layers)
    token_ids = torch.randint(IDS, (batch, tokens), generator=generator)
    hidden = torch.randn(*shape, TOPOLOGY.hidden_size, generator=generator)
    following = F.pad(token_ids[:, 1:], (0, 1))
    hidden[:, :, -1] = 0.3 * hidden[:, :, -1] + embedding()[following]
    # Each id has experts of its own, at every layer.
    first = (token_ids[:, :, None] * 5 + torch.arange(TOPOLOGY.layers)) % TOPOLOGY.experts
    ids = torch.stack([first, (first + 3) % TOPOLOGY.experts], -1)
    routed = routed_of(ids, TOPOLOGY.experts)
    return Window(
        token_ids_BT=token_ids,
        valid_BT=torch.ones(batch, tokens, dtype=torch.bool),
        scored_BT=torch.ones(batch, tokens, dtype=torch.bool),
        expert_ids_BTLK=ids,
        routed_BTLE=routed,
        router_BTLE=(4 * routed).softmax(-1),
        hidden_BTLD=hidden,
        soft=True,
        document_B=torch.arange(batch),
        phase_BT=torch.zeros(batch, tokens, dtype=torch.long),
    )


def embedding() -> Tensor:
    return 3 * torch.randn(IDS, TOPOLOGY.hidden_size, generator=torch.Generator().manual_seed(77))


def knowledge(*, unembedding: bool = True, routers: bool = True) -> Knowledge:
    generator = torch.Generator().manual_seed(3)
    shape = (TOPOLOGY.layers, TOPOLOGY.experts, TOPOLOGY.hidden_size)
    weight = torch.randn(shape, generator=generator) if routers else None
    bias = torch.randn(shape[:2], generator=generator) if routers else None
    windows = [a_window(seed) for seed in range(4)]
    return Knowledge(lambda: windows, weight, bias, embedding() if unembedding else None)


def prepared(**options: bool) -> RouterResidualPredictor:
    torch.manual_seed(0)
    predictor = RouterResidualPredictor(TOPOLOGY, HORIZONS)
    predictor.prepare(knowledge(**options))
    return predictor.eval()


@pytest.mark.parametrize("unembedding", [False, True])
def test_before_training_it_is_the_next_router(unembedding: bool) -> None:
    baseline = NextRouter(TOPOLOGY, HORIZONS)
    baseline.prepare(knowledge())
    window = a_window(9)
    with torch.no_grad():
        torch.testing.assert_close(prepared(unembedding=unembedding)(window), baseline(window))


def test_two_million_parameters_at_olmoe_1b_7b() -> None:
    olmoe = Topology(model_id="OLMoE-1B-7B", layers=16, experts=64, top_k=8, hidden_size=2048)
    with torch.device("meta"):
        assert parameter_count(RouterResidualPredictor(olmoe)) <= 2_000_000


def test_default_vectors_shift_the_baseline() -> None:
    predictor, window = prepared(), a_window(9)
    before = predictor(window).detach()
    with torch.no_grad():
        predictor.default_LD[2] += 1.0
    change = predictor(window).detach() - before
    # What layer 2 adds matters to events on whose way it lies: from layer 1 on one layer ahead, not from layer 2.
    expected = predictor.router_LED[2].sum(-1)
    torch.testing.assert_close(change[:, :, 1, 0], expected.expand_as(change[:, :, 1, 0]), rtol=1e-4, atol=1e-4)
    assert change[:, :, 2, 0].abs().max() == 0
    assert change[:, :, 2, 2].abs().max() > 0


def test_step_agrees_with_forward_through_the_lens() -> None:
    predictor = prepared()
    assert len(predictor.unembedding_VD) > 0
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    window = a_window(9, batch=1)
    with torch.no_grad():
        expected = predictor(window)[0].flatten(0, 1)
    state = predictor.start()
    stepped = torch.stack([predictor.step(state, observation) for observation in observations_of(window)])
    torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-4)
    compiled = predictor.compiled()
    state = compiled.start()
    fast = torch.stack([torch.from_numpy(compiled.step(state, each)) for each in observations_of(window)])
    torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-4)


def test_the_lens_finds_the_next_token() -> None:
    predictor = prepared().train()
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        window = a_window(step % 4)
        predictor(window)
        loss = predictor.auxiliary_loss(window)
        assert loss is not None
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    # Nothing is left over for a window that was not seen in training.
    predictor.eval()(a_window(9))
    assert predictor.auxiliary_loss(a_window(9)) is None


def test_rows_of_the_lens_follow_the_vocabulary() -> None:
    predictor = prepared()
    for token_id in range(IDS):
        row = int(predictor.vocabulary(torch.tensor(token_id)))
        torch.testing.assert_close(predictor.unembedding_VD[row], embedding()[token_id])
    assert predictor.unembedding_VD[0].abs().max() == 0


def test_weights_survive_a_state_dict() -> None:
    predictor = prepared()
    again = RouterResidualPredictor(TOPOLOGY, HORIZONS).eval()
    again.load_state_dict(predictor.state_dict())
    window = a_window(9)
    with torch.no_grad():
        torch.testing.assert_close(again(window), predictor(window))


def test_a_trace_without_routers_is_named() -> None:
    with pytest.raises(SpecmoeError, match="routers' weights"):
        prepared(routers=False)
