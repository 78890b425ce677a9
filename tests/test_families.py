"""Every Mixture-of-Experts family of the installed transformers: captured exactly, and without leaving a trace."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.sources.families import EXCLUDED, FAMILIES, ROWS_UP_TO, Family, RouterSite, family_of, router_sites
from specmoe.sources.importers import IMPORTERS
from specmoe.sources.recording import ForwardRoutes, LayerRoute, recorded_routes
from tiny_models import TINY, VOCABULARY, offered_families, tiny_model

NAMES = sorted(TINY)
EXPERTS = 8
SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt-softplus": lambda logits: nn.functional.softplus(logits).sqrt(),
}


def token_ids(rows: int = 3, length: int = 16) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def logits_of(output: Any) -> Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


class Calls:
    """The arguments with which routers were called, in order, kept to call them again."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.made: list[tuple[RouterSite, tuple[Any, ...], dict[str, Any]]] = []
        for site in router_sites(model, family):
            site.router.register_forward_pre_hook(self._keep(site), with_kwargs=True)

    def _keep(self, site: RouterSite) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.made.append((site, arguments, named))

        return hook


def assert_replayed(family: Family, calls: Calls, forward: ForwardRoutes) -> None:
    """Every router, called with what was recorded as its input, gives the recorded logits, ids and weights."""
    made = list(calls.made)  # replaying calls the hooks again
    assert [site.layer for site, _, _ in made] == list(forward.order)
    for (site, *call), route in zip(made, forward.layers, strict=True):
        (given, *others), named = _positional(*call)
        replay = site.router(route.hidden.view(given.shape), *others, **named)
        assert torch.equal(family.read_logits(replay).flatten(0, -2), route.logits)
        chosen, weights = _route_again(family, site.block, site.router, replay, route)
        assert torch.equal(chosen, route.ids)
        assert torch.equal(weights, route.weights)


def test_every_family_that_transformers_offers_is_covered_or_left_out_for_a_reason() -> None:
    installed, offered = Version(transformers.__version__), offered_families()
    # A family of a newer release than the rows were written for is captured by replay: tests/test_unlisted.py.
    if installed.release[:2] <= Version(ROWS_UP_TO).release:
        assert offered - set(FAMILIES) - set(EXCLUDED) == set()
    assert {name for name, family in FAMILIES.items() if Version(family.since) > installed} == set(FAMILIES) - offered
    assert (set(FAMILIES) & offered) - set(TINY) == {"switch_transformers"}  # an encoder-decoder: tests/test_capture.py


@pytest.mark.parametrize("name", NAMES)
def test_the_capture_is_exact_and_leaves_nothing_behind(name: str) -> None:
    model, family, ids = tiny_model(name), FAMILIES[name], token_ids()
    calls = Calls(model, family)
    with torch.no_grad():
        before = logits_of(model(input_ids=ids))
        calls.made.clear()
        with recorded_routes(model, family) as recorder:
            assert torch.equal(logits_of(model(input_ids=ids)), before)
        made, calls.made = calls.made, []
        assert torch.equal(logits_of(model(input_ids=ids)), before)
        calls.made = made
        (forward,) = recorder.take()
        assert torch.equal(forward.token_ids, ids.flatten())
        assert forward.rows.tolist() == [row for row in range(3) for _ in range(16)]
        assert_replayed(family, calls, forward)


def _positional(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (
        (arguments, named)
        if arguments
        else ((named["hidden_states"],), {k: v for k, v in named.items() if k != "hidden_states"})
    )


def _route_again(family: Family, block: Any, router: Any, replay: Any, route: LayerRoute) -> tuple[Tensor, Tensor]:
    """Ids and weights from a router's output, the way the family's block hands them to its experts."""
    if family.read_chosen is not None:
        return family.read_chosen(router, replay)
    if isinstance(replay, Tensor):
        weights, ids = block.route_tokens_to_experts(replay)
    else:
        _, weights, ids, *_ = replay
    assert family.read_executed is not None
    return family.read_executed(block, (route.hidden, ids, weights))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_row_says_is_true_of_the_model(name: str) -> None:
    model, family = tiny_model(name), FAMILIES[name]
    with torch.no_grad(), recorded_routes(model, family) as recorder:
        model(input_ids=token_ids())
    sites, layers = router_sites(model, family), recorder.take()[0].layers
    chosen = torch.cat([layer.ids for layer in layers if layer.ids.shape[-1] == layers[0].ids.shape[-1]])
    names = [name for site in sites for name, _ in (*site.block.named_buffers(), *site.block.named_parameters())]
    assert any(re.search(r"correction_bias$|expert_bias$|balancing_biases$", name) for name in names) == family.bias
    beside = {child for site in sites for part in (site.block, site.whole) for child, _ in part.named_children()}
    assert any("shared" in child for child in beside) == family.shared
    assert bool((chosen >= EXPERTS).any()) == family.zero
    whole_list = next(part for part in model.modules() if isinstance(part, nn.ModuleList) and sites[0].whole in part)
    if len(sites) < len(whole_list):
        assert family.dense
    if chosen.shape[-1] == 3 and not family.zero:
        # Four groups of two experts, of which two groups may be chosen from.
        assert max(len({expert // 2 for expert in row}) for row in chosen.tolist()) == (2 if family.groups else 3)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"phimoe", "zaya"}))
def test_gate_weights_are_the_scores_up_to_a_factor(name: str) -> None:
    model, family = tiny_model(name), FAMILIES[name]
    with torch.no_grad(), recorded_routes(model, family) as recorder:
        model(input_ids=token_ids())
    for layer in recorder.take()[0].layers:
        scores = SCORES[family.scoring](layer.logits.float()).gather(-1, layer.ids)
        factor = layer.weights.float() / scores
        torch.testing.assert_close(factor, factor[:, :1].expand_as(factor), rtol=1e-3, atol=1e-5)


def test_only_the_text_part_of_a_multimodal_model_is_watched() -> None:
    holder = nn.Module()
    holder.add_module("visual", nn.ModuleList([_moe_block()]))
    holder.add_module("language_model", nn.ModuleList([_moe_block(), _moe_block()]))
    assert [site.path for site in router_sites(holder, family_of("mixtral"))] == [
        "language_model.0",
        "language_model.1",
    ]


def _moe_block() -> nn.Module:
    block = nn.Module()
    block.gate, block.experts = nn.Linear(2, 2), nn.Linear(2, 2)
    return block


def test_a_model_type_finds_its_row() -> None:
    assert family_of("qwen3_5_moe_text") is FAMILIES["qwen3_5_moe"]
    assert family_of("inkling_mm_model") is FAMILIES["inkling"]
    with pytest.raises(SpecmoeError, match="did you mean mixtral"):
        family_of("mixtrall")
    for name, reason in EXCLUDED.items():
        with pytest.raises(SpecmoeError, match=re.escape(reason)):
            family_of(name)
    with pytest.raises(SpecmoeError, match="only experts 0 and 1"):
        family_of("nllb-moe")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_padding_is_stripped_on_either_side(name: str, side: str) -> None:
    model, family, ids = tiny_model(name), FAMILIES[name], token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    if side == "right":
        mask = mask.flip(1)
    with torch.no_grad(), recorded_routes(model, family) as recorder:
        model(input_ids=ids, attention_mask=mask)
    (forward,) = recorder.take()
    assert torch.equal(forward.token_ids, ids[mask.bool()])
    assert forward.rows.tolist() == [0] * 5 + [1] * 8
    assert all(len(layer.ids) == 13 for layer in forward.layers)


def test_the_verbs_that_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["families"]) == 0
    page = capsys.readouterr().out
    assert re.search(r"^deepseek_v3 +sigmoid +correction bias; group limits; shared experts; dense layers", page, re.M)
    assert "nllb_moe" in page.split("Left out")[1]
    assert run_verb(["families", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["families"]) == len(FAMILIES)
    assert run_verb(["formats", "--json"]) == 0
    assert {row["format"] for row in json.loads(capsys.readouterr().out)} == set(IMPORTERS)
    assert run_verb(["formats"]) == 0
    assert capsys.readouterr().out.count("\n") == len(IMPORTERS)
