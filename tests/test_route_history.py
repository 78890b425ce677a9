"""The route-history predictor and the table of token ids that it shares with others."""

from __future__ import annotations

from dataclasses import replace

import torch

from specmoe.dataset import Window, routed_of
from specmoe.predictors.base import Knowledge
from specmoe.predictors.blocks import PartlySharedLinear
from specmoe.predictors.history import add_token, averages_so_far, fading_averages, no_tokens
from specmoe.predictors.recipes import with_recipe
from specmoe.predictors.route_history import RouteHistoryPredictor
from specmoe.predictors.vocabulary import Vocabulary, routing_components
from specmoe.topology import Topology
from specmoe.training import loss_of, training_target

TOPOLOGY = Topology(model_id="small", layers=4, experts=8, top_k=2, hidden_size=0)


def repeating_window(seed: int, *, batch: int = 8, tokens: int = 24) -> Window:
    """Ids mean other experts in every window, so that only an id's earlier occurrence there tells."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(6, (batch, tokens), generator=generator)
    meaning = torch.rand(batch, 6, TOPOLOGY.layers, TOPOLOGY.experts, generator=generator).topk(2, -1).indices
    ids = meaning[torch.arange(batch)[:, None], token_ids]
    routed = routed_of(ids, TOPOLOGY.experts)
    return Window(
        token_ids_BT=token_ids,
        valid_BT=torch.ones(batch, tokens, dtype=torch.bool),
        scored_BT=torch.ones(batch, tokens, dtype=torch.bool),
        expert_ids_BTLK=ids,
        routed_BTLE=routed,
        router_BTLE=routed / 2,
        hidden_BTLD=None,
        soft=False,
        document_B=torch.arange(batch),
        phase_BT=torch.zeros(batch, tokens, dtype=torch.long),
    )


def test_an_ids_earlier_occurrence_is_remembered() -> None:
    torch.manual_seed(0)
    kind = with_recipe(RouteHistoryPredictor, width=0.5)
    predictor = kind(TOPOLOGY, (1,))
    predictor.prepare(Knowledge(lambda: [repeating_window(seed) for seed in range(4)]))
    optimizer = torch.optim.Adam(predictor.parameters(), lr=3e-3)
    predictor.train()
    for step in range(150):
        window = repeating_window(1000 + step)
        target, known = training_target(window, (1,), kind.recipe, None)
        loss, _ = loss_of(predictor(window), target, known, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    window = repeating_window(5)
    with torch.no_grad():
        found = predictor.eval()(window)[:, :, :-1, 0].topk(2, -1).indices
    hits = window.routed_BTLE[:, :, 1:].gather(-1, found).mean(-1)
    ids = window.token_ids_BT
    seen = ((ids[:, :, None] == ids[:, None]).tril(-1)).any(-1)
    # Chance is a quarter; an id that is new to the window cannot be known.
    assert hits[seen].mean() > 0.8
    assert hits[~seen].mean() < 0.6


def test_padding_changes_nothing() -> None:
    predictor = RouteHistoryPredictor(TOPOLOGY, (1, 2)).eval()
    window = repeating_window(1)
    valid = window.valid_BT.clone()
    valid[3, 10:] = False
    with torch.no_grad():
        whole, cut = predictor(window), predictor(replace(window, valid_BT=valid))
    torch.testing.assert_close(cut[3, :10], whole[3, :10])
    torch.testing.assert_close(cut[2], whole[2])
    assert cut[3, 10:].abs().max() == 0


def test_partly_shared_weights_are_the_sum_of_both_parts() -> None:
    torch.manual_seed(0)
    linear = PartlySharedLinear(3, 5, 4)
    inputs = torch.randn(6, 3, 5)
    with torch.no_grad():
        # Until training says otherwise, all layers do the same.
        torch.testing.assert_close(linear(inputs), inputs @ linear.shared)
        linear.weight.normal_()
        linear.bias.normal_()
        whole = linear(inputs)
        expected = torch.einsum("nlc,lcx->nlx", inputs, linear.whole()) + linear.bias
        torch.testing.assert_close(whole, expected)
        # One token, and one layer, take another path.
        torch.testing.assert_close(linear(inputs[:1]), expected[:1])
        for layer in range(3):
            torch.testing.assert_close(linear(inputs[:, layer : layer + 1], layer)[:, 0], expected[:, layer])


def test_horizons_that_point_to_one_layer_share_what_is_learned_of_it() -> None:
    predictor = RouteHistoryPredictor(TOPOLOGY, (1, 2)).eval()
    window = repeating_window(6)
    with torch.no_grad():
        before = predictor(window)
        predictor.head.target[2].add_(torch.randn(predictor.head.target[2].shape))
        changed = (before != predictor(window)).flatten(4).any(-1).any(0).any(0)
    # Layer 2 is one ahead of layer 1 and two ahead of layer 0.
    assert changed.nonzero().tolist() == [[0, 1], [1, 0]]


def test_fading_averages_token_by_token() -> None:
    routed = repeating_window(2).routed_BTLE[:1]
    expected = fading_averages(routed)[0]
    memory = no_tokens(TOPOLOGY)
    for t in range(routed.shape[1]):
        torch.testing.assert_close(averages_so_far(memory), expected[t])
        add_token(memory, routed[0, t])
    # A weighted average of what was routed to K experts a layer is still K experts' worth.
    torch.testing.assert_close(expected[1:].unflatten(-1, (2, -1)).sum(-1), torch.full((23, 4, 2), 2.0))


def test_frequent_ids_have_rows_and_others_share_one() -> None:
    window = repeating_window(3, batch=1, tokens=8)
    ids = torch.tensor([[7, 7, 7, 900, 900, 3, 4, 5]])
    vocabulary = Vocabulary(3)
    vocabulary.prepare([replace(window, token_ids_BT=ids)])
    assert vocabulary(torch.tensor([7, 900, 3, 5, 901, 10_000, -1])).tolist() == [1, 2, 0, 0, 0, 0, 0]


def test_components_tell_ids_apart_by_their_routing() -> None:
    window = repeating_window(4, batch=1, tokens=200)
    vocabulary = Vocabulary(16)
    vocabulary.prepare([window])
    torch.manual_seed(0)
    components = routing_components([window], vocabulary, 4)
    assert components.shape == (16, 4)
    assert components[0].abs().max() == 0
    assert components[7:].abs().max() == 0
    rows = components[1:7]
    distance = torch.cdist(rows, rows) + torch.eye(6) * 10
    assert distance.min() > 0.1
