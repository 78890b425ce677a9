"""The training-free predictors, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specmoe.dataset import Window, targets_of
from specmoe.errors import SpecmoeError
from specmoe.predictors._linear import fit_linear_probe
from specmoe.predictors.base import Knowledge, Observation, Predictor, parameter_count
from specmoe.predictors.decayed_recent import DecayedRecent
from specmoe.predictors.layer_frequency import LayerFrequency
from specmoe.predictors.markov import LayerMarkov
from specmoe.predictors.next_router import NextRouter
from specmoe.predictors.previous_token import PreviousToken
from specmoe.predictors.random_guess import RandomGuess
from specmoe.predictors.ridge import Ridge
from specmoe.predictors.sequence_match import SequenceMatch
from specmoe.predictors.token_markov import TokenMarkov
from specmoe.predictors.token_table import TokenTable
from specmoe.topology import Topology

ALL: list[type[Predictor]] = [
    RandomGuess,
    LayerFrequency,
    PreviousToken,
    DecayedRecent,
    LayerMarkov,
    TokenTable,
    TokenMarkov,
    NextRouter,
    SequenceMatch,
    Ridge,
]
TOY = Topology(model_id="toy", layers=2, experts=3, top_k=1, hidden_size=2)


def window_of(
    routes: Tensor | Sequence[Any],
    experts: int,
    *,
    token_ids: list[int] | None = None,
    router: Tensor | None = None,
    hidden: Tensor | None = None,
    document: int = 0,
) -> Window:
    """One window from expert ids [T, L] or [T, L, K]."""
    ids = torch.as_tensor(routes)
    ids = (ids if ids.dim() == 3 else ids[..., None])[None]
    slots = torch.where(ids < 0, experts, ids)
    routed = torch.zeros(*ids.shape[:3], experts + 1).scatter_(-1, slots, 1.0)[..., :experts]
    tokens = ids.shape[1]
    return Window(
        token_ids_BT=torch.tensor([token_ids or [0] * tokens]),
        valid_BT=torch.ones(1, tokens, dtype=torch.bool),
        scored_BT=torch.ones(1, tokens, dtype=torch.bool),
        expert_ids_BTLK=ids,
        routed_BTLE=routed,
        router_BTLE=routed / routed.sum(-1, keepdim=True).clamp_min(1) if router is None else router[None],
        hidden_BTLD=None if hidden is None else hidden[None],
        soft=router is not None,
        document_B=torch.tensor([document]),
    )


def knowledge(*windows: Window, router_weight_LED: Tensor | None = None) -> Knowledge:
    return Knowledge(lambda: iter(windows), router_weight_LED)


def prepared(
    cls: type[Predictor], topology: Topology, *windows: Window, horizons: tuple[int, ...] = (1, 2)
) -> Predictor:
    predictor = cls(topology, horizons)
    predictor.prepare(knowledge(*windows))
    return predictor


def random_window(seed: int, topology: Topology, tokens: int = 24, document: int = 0) -> Window:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, topology.layers, topology.experts, generator=generator)
    return window_of(
        logits.topk(topology.top_k, -1).indices,
        topology.experts,
        token_ids=torch.randint(0, 9, (tokens,), generator=generator).tolist(),
        router=logits.softmax(-1),
        hidden=torch.randn(tokens, topology.layers, topology.hidden_size, generator=generator),
        document=document,
    )


def recall(predictor: Predictor, window: Window) -> Tensor:
    """Recall@K at each horizon, [H]."""
    targets = targets_of(window, predictor.horizons)
    chosen = predictor(window).topk(predictor.topology.top_k, -1).indices
    found = targets.routed_BTSHE.gather(-1, chosen).sum(-1) * targets.known_BTSH
    wanted = targets.routed_BTSHE.sum(-1) * targets.known_BTSH
    return found.sum((0, 1, 2)) / wanted.sum((0, 1, 2))


def concatenated(*windows: Window) -> Window:
    tensors = {
        name: torch.cat([getattr(window, name) for window in windows])
        for name, value in vars(windows[0]).items()
        if isinstance(value, Tensor)
    }
    return replace(windows[0], **tensors)


def padded(window: Window, before: int, after: int) -> Window:
    """The window with context that is not scored before it and padding behind it."""
    changed: dict[str, Tensor] = {}
    for name, value in vars(window).items():
        if isinstance(value, Tensor) and name != "document_B":
            noise = value.flip(1)[:, :before]
            fill = torch.full_like(value[:, :1], -1 if name == "expert_ids_BTLK" else 0)
            changed[name] = torch.cat([noise, value, fill.repeat_interleave(after, 1)], 1)
    changed["scored_BT"][:, :before] = False
    return replace(window, **changed)


# Layer 0 holds 0, 0, 1 and layer 1 holds 1, 2, 1: shares with one count added to each expert.
TOY_ROUTES = [[0, 1], [0, 2], [1, 1]]
SHARE_0 = torch.tensor([3.0, 2.0, 1.0]) / 6
SHARE_1 = torch.tensor([1.0, 3.0, 2.0]) / 6


def test_layer_frequency_counts_each_layer() -> None:
    window = window_of(TOY_ROUTES, 3)
    share = prepared(LayerFrequency, TOY, window)(window).exp()
    # Horizon 1 of layer 0 and horizon 2 of layer 1 point to layer 1, the others to layer 0.
    torch.testing.assert_close(share[0, :, 0, 0], SHARE_1.expand(3, 3))
    torch.testing.assert_close(share[0, :, 1, 0], SHARE_0.expand(3, 3))
    torch.testing.assert_close(share[0, :, 1, 1], SHARE_1.expand(3, 3))


def test_markov_counts_pairs_per_source_layer_and_horizon() -> None:
    window = window_of(TOY_ROUTES, 3)
    share = prepared(LayerMarkov, TOY, window)(window).exp()
    one_hot = torch.eye(3)
    # Layer 0 to layer 1: 0 was followed by 1 and by 2, 1 by 1; one count of the frequency is added.
    torch.testing.assert_close(share[0, 0, 0, 0], (one_hot[1] + one_hot[2] + SHARE_1) / 3)
    torch.testing.assert_close(share[0, 2, 0, 0], (one_hot[1] + SHARE_1) / 2)
    # Layer 1 to layer 0 of the next token: 1 was followed by 0, 2 by 1; the last token has no successor.
    torch.testing.assert_close(share[0, 0, 1, 0], (one_hot[0] + SHARE_0) / 2)
    torch.testing.assert_close(share[0, 1, 1, 0], (one_hot[1] + SHARE_0) / 2)
    # Layer 0 to layer 0 of the next token: 0 was followed by 0 and by 1.
    torch.testing.assert_close(share[0, 0, 0, 1], (one_hot[0] + one_hot[1] + SHARE_0) / 3)


def test_markov_averages_over_the_source_experts_and_falls_back_without_any() -> None:
    topology = TOY.model_copy(update={"top_k": 2})
    predictor = prepared(LayerMarkov, topology, window_of([[[0, 1], [1, 2]], [[0, 2], [0, 1]]], 3))
    single = predictor(window_of([[[0, -1], [0, 1]], [[2, -1], [0, 1]]], 3)).exp()
    pair = predictor(window_of([[[0, 2], [0, 1]], [[-1, -1], [0, 1]]], 3)).exp()
    torch.testing.assert_close(pair[0, 0, 0], (single[0, 0, 0] + single[0, 1, 0]) / 2)
    torch.testing.assert_close(pair[0, 1, 0, 0], torch.tensor([2.0, 3.0, 2.0]) / 7)


def test_token_table_counts_per_id_and_backs_off() -> None:
    train = window_of(TOY_ROUTES, 3, token_ids=[5, 5, 9])
    predictor = prepared(TokenTable, TOY, train, horizons=(1, 2, 3))
    assert isinstance(predictor, TokenTable)
    weight = float(predictor.strength)
    share = predictor(window_of([[0, 0]] * 4, 3, token_ids=[5, 9, 7, 1000])).exp()
    seen = torch.tensor([0.0, 1.0, 1.0])
    # Id 5 saw experts 1 and 2 at layer 1, id 9 saw expert 1.
    torch.testing.assert_close(share[0, 0, 0, 0], (seen + weight * SHARE_1) / (2 + weight))
    torch.testing.assert_close(share[0, 1, 0, 0], (torch.eye(3)[1] + weight * SHARE_1) / (1 + weight))
    # After id 5 came expert 0 and expert 1 at the next token's layer 0; nothing came after id 9.
    after = torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(share[0, 0, 0, 1], (after + weight * SHARE_0) / (2 + weight))
    torch.testing.assert_close(share[0, 0, 1, 0], share[0, 0, 0, 1])
    torch.testing.assert_close(share[0, 1, 0, 1], SHARE_0)
    # Ids that were not seen, inside and beyond the known range.
    torch.testing.assert_close(share[0, 2:, 0, 0], SHARE_1.expand(2, 3))
    torch.testing.assert_close(share[0, 2:, 0, 2], SHARE_1.expand(2, 3))


def test_token_table_trusts_ids_as_far_as_they_repeat() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (200,), generator=generator)
    told = torch.stack([ids % 3, (ids + 1) % 3], 1)
    untold = torch.randint(0, 3, (200, 2), generator=generator)
    strengths = []
    for routes in (told, untold):
        predictor = prepared(TokenTable, TOY, window_of(routes, 3, token_ids=ids.tolist()))
        assert isinstance(predictor, TokenTable)
        strengths.append(float(predictor.strength))
    assert strengths[0] < 1
    assert strengths[1] > 16


def test_token_markov_is_the_product_over_the_frequency() -> None:
    train = window_of(TOY_ROUTES, 3, token_ids=[5, 5, 9])
    table, markov, both = (prepared(cls, TOY, train)(train) for cls in (TokenTable, LayerMarkov, TokenMarkov))
    product = table[0, 0, 0, 0].exp() * markov[0, 0, 0, 0].exp() / SHARE_1
    torch.testing.assert_close(both[0, 0, 0, 0].exp(), product / product.sum())


def test_previous_token_finds_the_latest_known_place() -> None:
    window = window_of([[0, 1], [2, 0], [1, 2]], 3)
    best = prepared(PreviousToken, TOY, window, horizons=(1, 2, 3))(window)[0].argmax(-1)
    # Nothing is known of layer 1 at (0, 0): its frequency decides, 0, 1 and 2 being even there.
    # (1, 0): layer 1 was last seen at token 0; layer 0 of the next token is seen now; layer 1 again.
    assert best[1, 0].tolist() == [1, 2, 1]
    # (1, 1): the next token's layers 0 and 1 are both seen now, and so is layer 0 of the one after.
    assert best[1, 1].tolist() == [2, 0, 2]
    assert best[2, 0].tolist() == [0, 1, 0]


def test_previous_token_breaks_ties_by_router_then_frequency() -> None:
    topology = Topology(model_id="toy", layers=1, experts=4, top_k=2, hidden_size=2)
    router = torch.tensor([[[0.1, 0.4, 0.3, 0.2]], [[0.25, 0.25, 0.25, 0.25]]])
    train = window_of([[[1, 2]], [[3, 2]], [[3, 2]]], 4)
    predictor = prepared(PreviousToken, topology, train, horizons=(1,))
    scores = predictor(window_of([[[0, 2]], [[0, 1]]], 4, router=router))[0, :, 0, 0]
    # Token 0 was routed to 0 and 2 (the router prefers 2), then 1 before 3.
    assert scores[0].argsort(descending=True).tolist() == [2, 0, 1, 3]
    # Token 1's router says nothing; training used 2 most, then 3, 1 and never 0.
    assert scores[1].argsort(descending=True).tolist() == [1, 0, 2, 3]


def test_previous_token_without_a_past_is_the_frequency() -> None:
    train = window_of(TOY_ROUTES, 3)
    share = prepared(PreviousToken, TOY, train)(train).softmax(-1)
    torch.testing.assert_close(share[0, 0, 0, 0], SHARE_1)
    assert not torch.allclose(share[0, 1, 0, 0], SHARE_1)


def test_decayed_recent_sums_with_decay_and_forgets() -> None:
    predictor = DecayedRecent(TOY, (1, 2))
    predictor.share_LE.copy_(torch.stack([SHARE_0, SHARE_1]))
    predictor.decay.fill_(0.5)
    predictor.strength.fill_(2.0)
    share = predictor(window_of([[0, 1], [0, 2], [1, 1]], 3)).exp()
    # At (2, 0), layer 1 was at 2 one token ago and at 1 two tokens ago; layer 0 of token 2 is known.
    torch.testing.assert_close(share[0, 2, 0, 0], (torch.tensor([0.0, 0.5, 1.0]) + 2 * SHARE_1) / 3.5)
    torch.testing.assert_close(share[0, 2, 0, 1], (torch.tensor([0.75, 1.0, 0.0]) + 2 * SHARE_0) / 3.75)
    torch.testing.assert_close(share[0, 0, 0, 0], SHARE_1)
    # Expert 2 of layer 0 was used once, at any place: 31 tokens later it still counts, 32 later not.
    predictor.decay.fill_(1.0)
    for place in (0, 1, 31):
        routes = torch.zeros(70, 2, dtype=torch.long)
        routes[place, 0] = 2
        share = predictor(window_of(routes, 3)).exp()[0, :, 0, 1, 2]
        torch.testing.assert_close(share[place + 31], (1 + 2 * SHARE_0[2]) / 34)
        torch.testing.assert_close(share[place + 32], 2 * SHARE_0[2] / 34)


def test_decayed_recent_chooses_the_decay_that_fits() -> None:
    generator = torch.Generator().manual_seed(0)
    # Short runs of one expert want a short memory, a fixed favourite among noise a long one.
    runs = torch.randint(0, 3, (60, 2), generator=generator).repeat_interleave(6, 0)
    favourite = torch.arange(6).remainder(3).repeat_interleave(60)[:, None].expand(-1, 2)
    noisy = torch.where(
        torch.rand(360, 2, generator=generator) < 0.45, favourite, torch.randint(0, 3, (360, 2), generator=generator)
    )
    short, long = (prepared(DecayedRecent, TOY, window_of(routes, 3)) for routes in (runs, noisy))
    assert isinstance(short, DecayedRecent)
    assert isinstance(long, DecayedRecent)
    assert float(short.decay) <= 0.6
    assert float(long.decay) >= 0.8


def test_next_router_asks_the_target_layer() -> None:
    weight = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [[0.0, 2.0], [3.0, 0.0], [1.0, 1.0]]])
    hidden = torch.tensor([[[1.0, 2.0], [5.0, 7.0]]])
    predictor = NextRouter(TOY, (1, 2))
    predictor.prepare(
        replace(knowledge(router_weight_LED=weight), router_bias_LE=torch.tensor([[0.0] * 3, [10.0, 0, 0]]))
    )
    logits = predictor(window_of([[0, 1]], 3, hidden=hidden))
    torch.testing.assert_close(logits[0, 0, 0, 0], torch.tensor([14.0, 3.0, 3.0]))
    torch.testing.assert_close(logits[0, 0, 0, 1], torch.tensor([1.0, 2.0, 0.0]))
    torch.testing.assert_close(logits[0, 0, 1, 0], torch.tensor([5.0, 7.0, 0.0]))
    torch.testing.assert_close(logits[0, 0, 1, 1], torch.tensor([24.0, 15.0, 12.0]))


def test_what_is_missing_is_named() -> None:
    window = window_of(TOY_ROUTES, 3)
    with pytest.raises(SpecmoeError, match="routers' weights"):
        NextRouter(TOY).prepare(knowledge(window))
    with pytest.raises(SpecmoeError, match="shape"):
        NextRouter(TOY).prepare(knowledge(window, router_weight_LED=torch.zeros(2, 3, 5)))
    with pytest.raises(SpecmoeError, match="hidden"):
        NextRouter(TOY)(window)
    with pytest.raises(SpecmoeError, match="hidden"):
        Ridge(TOY).prepare(knowledge(window))
    with pytest.raises(SpecmoeError, match="router_logits"):
        fit_linear_probe(lambda: [window_of(TOY_ROUTES, 3, hidden=torch.ones(3, 2, 2))], (1,), targets="log_router")
    with pytest.raises(SpecmoeError, match="NaN"):
        Ridge(TOY).prepare(knowledge(window_of(TOY_ROUTES, 3, hidden=torch.full((3, 2, 2), torch.nan))))


def test_sequence_match_follows_the_nearest_document() -> None:
    first = window_of([[0, 1]] * 10, 3, document=4)
    second = window_of([[1, 2]] * 10, 3, document=7)
    predictor = prepared(SequenceMatch, TOY, first, second)
    share = predictor(window_of([[1, 0], [0, 1], [0, 1]], 3)).exp()
    prior = torch.tensor([[11.0, 11.0, 1.0], [1.0, 11.0, 11.0]]) / 23
    like_first = (10 * torch.eye(3)[[0, 1]] + 3 * prior) / 13
    like_second = (10 * torch.eye(3)[[1, 2]] + 3 * prior) / 13
    # After one expert of the second document it is nearest; expert 0 at layer 1 speaks for neither.
    torch.testing.assert_close(share[0, 0, 0, 0], like_second[1])
    # At (1, 0) layer 0 is even and layer 1 of token 1 is not known yet: the first entry of equals.
    torch.testing.assert_close(share[0, 1, 0, 0], like_first[1])
    torch.testing.assert_close(share[0, 2, 1], like_first)


def test_sequence_match_clusters_what_does_not_fit() -> None:
    topology = Topology(model_id="toy", layers=2, experts=8, top_k=1, hidden_size=2)
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randint(0, 4, (300,), generator=generator)
    # Each kind of document keeps to two of the eight experts.
    windows = [
        window_of(2 * kind + torch.randint(0, 2, (12, 2), generator=generator), 8, document=index)
        for index, kind in enumerate(kinds.tolist())
    ]
    predictor = prepared(SequenceMatch, topology, *windows)
    assert isinstance(predictor, SequenceMatch)
    assert torch.isfinite(predictor.unit_NLE).all()
    share = predictor(windows[0]).exp()[0, -1, 0, 0]
    assert set(share.topk(2).indices.tolist()) == {2 * int(kinds[0]), 2 * int(kinds[0]) + 1}


def test_random_guess_is_at_chance_and_differs_between_events() -> None:
    topology = Topology(model_id="toy", layers=4, experts=8, top_k=2, hidden_size=2)
    window = random_window(0, topology, tokens=2000)
    predictor = prepared(RandomGuess, topology, window)
    torch.testing.assert_close(recall(predictor, window), torch.full((2,), 0.25), atol=0.02, rtol=0)
    best = predictor(window).argmax(-1).flatten()
    torch.testing.assert_close(best.bincount(minlength=8) / len(best), torch.full((8,), 0.125), atol=0.01, rtol=0)


def test_markov_beats_frequency_on_markov_routing() -> None:
    topology = Topology(model_id="toy", layers=3, experts=6, top_k=1, hidden_size=2)
    generator = torch.Generator().manual_seed(2)
    step = torch.full((6, 6), 0.06).fill_diagonal_(0.0).roll(1, 1) + 0.7 * torch.eye(6).roll(2, 1)
    chain = [0]
    for _ in range(3 * 1200 - 1):
        chain.append(int(torch.multinomial(step[chain[-1]], 1, generator=generator)))
    routes = torch.tensor(chain).view(1200, 3)
    train, test = window_of(routes[:800], 6), window_of(routes[800:], 6)
    markov = recall(prepared(LayerMarkov, topology, train), test)
    frequency = recall(prepared(LayerFrequency, topology, train), test)
    assert markov[0] > 0.6
    assert (markov > frequency + 0.1).all()


def linear_window(seed: int, topology: Topology, weight_LDE: Tensor, tokens: int, document: int) -> Window:
    """Hidden states of which layer 0's tells layer 1's routing, and the other way round for the next token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 + 2 * torch.randn(tokens, 2, topology.hidden_size, generator=generator)
    flat = hidden.flatten(0, 1)
    logits = torch.einsum("pd,pde->pe", flat, weight_LDE.repeat(tokens, 1, 1))
    logits = torch.cat([torch.zeros(1, topology.experts), logits[:-1]]).view(tokens, 2, -1)
    ids = logits.topk(topology.top_k, -1).indices
    return window_of(ids, topology.experts, router=logits.softmax(-1), hidden=hidden, document=document)


def test_ridge_finds_what_is_linear_in_the_hidden_state() -> None:
    topology = Topology(model_id="toy", layers=2, experts=6, top_k=2, hidden_size=8)
    weight = 0.25 * torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(3))
    windows = [linear_window(seed, topology, weight, 40, document=seed) for seed in range(12)]
    predictor = prepared(Ridge, topology, *windows, horizons=(1, 2))
    assert isinstance(predictor, Ridge)
    test = linear_window(99, topology, weight, 200, document=99)
    found = recall(predictor, test)
    assert found[0] > 0.98
    # Two places ahead depends on another hidden state: no better than the frequency.
    frequency = recall(prepared(LayerFrequency, topology, *windows), test)
    assert frequency[0] < 0.8
    assert abs(found[1] - frequency[1]) < 0.05
    assert predictor.targets[0] == "log_router"
    # The outputs are the logits themselves, up to what a softmax does not see.
    truth = targets_of(test, (1,))
    known = truth.known_BTSH[..., 0]
    torch.testing.assert_close(
        predictor(test)[..., 0, :].softmax(-1)[known], truth.router_BTSHE[..., 0, :][known], atol=0.02, rtol=0
    )


@pytest.mark.parametrize("kind", ["routed", "log_router"])
def test_linear_probe_solves_the_masked_normal_equations(kind: str) -> None:
    topology = Topology(model_id="toy", layers=3, experts=4, top_k=2, hidden_size=5)
    windows = [random_window(seed, topology, tokens=7 + seed, document=seed) for seed in range(6)]
    # Some tokens were served by no expert, so that what is known differs between horizons anywhere.
    dropped = windows[2].expert_ids_BTLK.clone()
    dropped[0, 3, 1], dropped[0, 5, 2] = -1, -1
    windows[2] = replace(windows[2], expert_ids_BTLK=dropped)
    horizons = (1, 2, 5)
    probe = fit_linear_probe(
        lambda: windows, horizons, targets="routed" if kind == "routed" else "log_router", penalties=(0.03,)
    )
    targets = [targets_of(window, horizons) for window in windows]
    for layer in range(3):
        every = [(w.hidden_BTLD, t) for w, t in zip(windows, targets, strict=True)]
        whole = torch.cat(
            [h[0, :, layer][t.known_BTSH[0, :, layer].all(-1)] for h, t in every if h is not None]
        ).double()
        mean, scale = whole.mean(0), whole.std(0, correction=0)
        torch.testing.assert_close(probe.mean_LD[layer].double(), mean, atol=1e-5, rtol=1e-5)
        for h in range(3):
            rows, aims = [], []
            for hidden, target in every:
                assert hidden is not None
                known = target.known_BTSH[0, :, layer, h]
                rows.append(hidden[0, :, layer][known])
                logs = target.router_BTSHE.clamp_min(1e-9).log()
                aim = target.routed_BTSHE if kind == "routed" else logs - logs.mean(-1, keepdim=True)
                aims.append(aim[0, :, layer, h][known])
            x = (torch.cat(rows).double() - mean) / scale
            x = torch.cat([x, torch.ones(len(x), 1)], 1)
            ridge = 0.03 * len(x) * torch.diag(torch.tensor([1.0] * 5 + [0.0]).double())
            expected = torch.linalg.solve(x.T @ x + ridge, x.T @ torch.cat(aims).double())
            torch.testing.assert_close(probe.weight_LHDE[layer, h].double(), expected[:5], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(probe.bias_LHE[layer, h].double(), expected[5], atol=1e-5, rtol=1e-5)


SMALL = Topology(model_id="toy", layers=3, experts=5, top_k=2, hidden_size=4)
HORIZONS = (1, 3, 4)


def fitted(cls: type[Predictor], windows: list[Window]) -> Predictor:
    predictor = cls(SMALL, HORIZONS)
    weight = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(7))
    predictor.prepare(Knowledge(lambda: iter(windows), weight))
    return predictor


@pytest.mark.parametrize("cls", ALL)
def test_context_and_padding_leave_what_is_learned_alone(cls: type[Predictor]) -> None:
    plain = [random_window(seed, SMALL, document=seed) for seed in range(6)]
    if cls in (PreviousToken, DecayedRecent):
        # These learn from what follows what, and context may precede: padding alone must not matter.
        other = [padded(window, 0, 5) for window in plain]
    else:
        other = [padded(window, 3, 5) for window in plain]
    expected, found = fitted(cls, plain).state_dict(), fitted(cls, other).state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("cls", ALL)
def test_batches_and_single_windows_teach_the_same(cls: type[Predictor]) -> None:
    windows = [random_window(seed, SMALL, document=seed) for seed in range(6)]
    expected, found = (fitted(cls, windows).state_dict(), fitted(cls, [concatenated(*windows)]).state_dict())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("cls", ALL)
def test_saved_statistics_come_back(cls: type[Predictor], tmp_path: Path) -> None:
    predictor = fitted(cls, [random_window(seed, SMALL, document=seed) for seed in range(3)])
    assert parameter_count(predictor) == 0
    assert predictor.recipe.category == "training-free"
    save_file(predictor.state_dict(), str(tmp_path / "state.safetensors"))
    again = cls(SMALL, HORIZONS)
    again.load_state_dict(load_file(str(tmp_path / "state.safetensors")))
    window = random_window(50, SMALL)
    assert torch.equal(again(window), predictor(window))
    if cls is not RandomGuess:
        wrong = cls(SMALL.model_copy(update={"experts": 6}), HORIZONS)
        with pytest.raises(RuntimeError, match="size mismatch"):
            wrong.load_state_dict(predictor.state_dict())


@pytest.mark.parametrize("cls", ALL)
def test_one_event_at_a_time_gives_the_window(cls: type[Predictor]) -> None:
    predictor = fitted(cls, [random_window(seed, SMALL, document=seed) for seed in range(3)])
    window = random_window(60, SMALL, tokens=36)
    assert window.hidden_BTLD is not None
    logits, state = predictor(window)[0], predictor.start()
    assert logits.shape == (36, 3, len(HORIZONS), 5)
    for t in range(36):
        for layer in range(3):
            event = Observation(
                int(window.token_ids_BT[0, t]),
                layer,
                window.expert_ids_BTLK[0, t, layer],
                window.router_BTLE[0, t, layer],
                window.hidden_BTLD[0, t, layer],
            )
            torch.testing.assert_close(predictor.step(state, event), logits[t, layer], atol=1e-5, rtol=1e-5)
