"""Families without a row: captured exactly as with one, or refused with the reason; never captured wrongly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specmoe.errors import SpecmoeError
from specmoe.sources import capture
from specmoe.sources.capture import collect
from specmoe.sources.families import FAMILIES, Family, family_of, router_sites
from specmoe.sources.loading import LoadedModel
from specmoe.sources.recording import recorded_routes
from specmoe.sources.unlisted import checked_by_replay
from specmoe.topology import Topology
from specmoe.trace import Trace
from test_capture import by_name, documents, saved, tokenizer  # noqa: F401
from test_families import token_ids
from tiny_models import TINY, tiny_model

# What departs from the common seam; each must be refused.
REFUSED = {
    "diffusion_gemma": "scores, not logits",
    "gemma4": "scores, not logits",
    "jetmoe": "no MoE layer",
    "llama4": "called in a way of their own",
    "zaya": "weight 0",
}


def unlisted(name: str) -> LoadedModel:
    """A tiny model in memory, its family taken for unknown."""
    shape = Topology(model_id="tiny", layers=1, experts=8, top_k=1, hidden_size=32)
    return LoadedModel(tiny_model(name), None, Family(name, "unknown", listed=False), shape, "decoder", "", {})


@pytest.mark.parametrize("name", sorted(set(TINY) - set(REFUSED)))
def test_what_passes_the_replay_is_captured_as_with_its_row(name: str) -> None:
    loaded, family, ids = unlisted(name), FAMILIES[name], token_ids(1, 24)
    checked = checked_by_replay(loaded, ids[0].tolist())
    recorded = []
    for tried in (family, loaded.family):
        with torch.no_grad(), recorded_routes(loaded.model, tried) as recorder:
            loaded.model(input_ids=ids)
        recorded.append(recorder.take()[0].layers)
    top_k = True
    for known, guessed in zip(*recorded, strict=True):
        for field in known.FIELDS:
            assert torch.equal(getattr(known, field), getattr(guessed, field))
        top = known.logits.topk(known.ids.shape[-1], -1).indices
        top_k &= torch.equal(top.sort(-1).values, known.ids.sort(-1).values)
    assert checked.settings == {"choice_is_top_k": top_k}


def test_both_answers_about_the_choice_occur() -> None:
    ids = token_ids(1, 24)[0].tolist()
    assert checked_by_replay(unlisted("mixtral"), ids).settings == {"choice_is_top_k": True}
    assert checked_by_replay(unlisted("deepseek_v3"), ids).settings == {"choice_is_top_k": False}


@pytest.mark.parametrize("name", sorted(set(REFUSED) & set(TINY)))
def test_what_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(SpecmoeError, match=REFUSED[name]):
        checked_by_replay(unlisted(name), token_ids(1, 24)[0].tolist())


@pytest.mark.parametrize("what", ["logits", "ids", "weights"])
def test_a_router_that_answers_otherwise_the_second_time_is_refused(what: str) -> None:
    loaded = unlisted("olmoe")
    router = router_sites(loaded.model, loaded.family)[1].router
    answers = iter(range(100))

    def drifting(_module: Any, _arguments: Any, output: Any) -> Any:
        logits, weights, ids = output
        if next(answers) == 0:
            return None
        changed = {"logits": (logits + 1e-3, weights, ids), "ids": (logits, weights, ids.flip(-1))}
        return changed.get(what, (logits, weights * 1.001, ids))

    router.register_forward_hook(drifting)
    with pytest.raises(SpecmoeError, match=f"other {what}"):
        checked_by_replay(loaded, [1, 2, 3, 4])


def forget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, name)
    assert not family_of(name).listed


def test_a_checkpoint_of_an_unlisted_family_is_collected_with_one_line_about_it(
    tmp_path: Path,
    tokenizer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capture, "measure_layer_us", lambda *_: 1.0)
    directory = saved(tiny_model("qwen3_moe", vocab_size=320), tokenizer, tmp_path / "model")
    collect(directory, documents(6), tmp_path / "listed")
    forget("qwen3_moe", monkeypatch)
    notes: list[str] = []
    collect(directory, documents(6), tmp_path / "unlisted", on_note=notes.append)
    assert len(notes) == 1
    assert notes[0].startswith("qwen3_moe models are not listed")
    listed, found = by_name(tmp_path / "listed"), by_name(tmp_path / "unlisted")
    assert listed.keys() == found.keys()
    for name, record in listed.items():
        assert torch.equal(record.expert_ids, found[name].expert_ids)
        assert torch.equal(record.router_logits, found[name].router_logits)
    assert Trace.open(tmp_path / "unlisted").manifest.source.settings["choice_is_top_k"] is True


@pytest.mark.parametrize("name", ["jetmoe", "llama4"])
def test_a_checkpoint_that_does_not_fit_leaves_no_trace(
    name: str,
    tmp_path: Path,
    tokenizer: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = saved(tiny_model(name, vocab_size=320), tokenizer, tmp_path / "model")
    forget(name, monkeypatch)
    monkeypatch.setitem(FAMILIES, "other", replace(FAMILIES["olmoe"], name="other"))
    with pytest.raises(SpecmoeError, match="not known to specmoe"):
        collect(directory, documents(6), tmp_path / "trace")
    assert not (tmp_path / "trace").exists()
