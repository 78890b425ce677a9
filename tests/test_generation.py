"""Routes of what a model writes itself: flagged apart, the same as reading it, and cut where the text ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specmoe.cli import run_verb
from specmoe.errors import SpecmoeError
from specmoe.sources.capture import collect, load_model, recorded_routes
from specmoe.sources.generation import Generation, join, run_generation
from specmoe.trace import Phase, Trace
from test_capture import by_name, documents, identical, olmoe_dir, saved, switch_dir, tokenizer  # noqa: F401
from tiny_models import tiny_model

TEXT = documents(8)


@pytest.mark.parametrize(
    "name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "jamba", "gemma4", "longcat_flash"]
)
def test_decoding_with_a_cache_routes_as_reading_the_whole_text_does(name: str, tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    sizes = ("vocab_size", "vocab_size_per_layer_input") if name == "gemma4" else ("vocab_size",)
    model = tiny_model(name, **dict.fromkeys(sizes, 320))
    model.generation_config.eos_token_id = None
    directory = saved(model, tokenizer, tmp_path / "model")
    collect(directory, TEXT, tmp_path / "trace", generation=Generation(5), batch_tokens=256)
    loaded = load_model(directory)
    places = agreeing = 0
    for record in by_name(tmp_path / "trace").values():
        prompt = int((record.phase == Phase.PREFILL).sum())
        assert record.phase.tolist() == [Phase.PREFILL] * prompt + [Phase.DECODE] * 5
        with torch.no_grad(), recorded_routes(loaded.model, loaded.family) as recorder:
            output = loaded.model(input_ids=record.token_ids[None].long(), use_cache=False)
        # Greedy: each written token is the likeliest after those before it.
        assert output.logits[0].argmax(-1)[prompt - 1 : -1].tolist() == record.token_ids[prompt:].tolist()
        again = torch.stack([layer.ids for layer in recorder.take()[0].layers], 1)
        # A tie that rounding breaks otherwise is possible, and rare.
        places += again[..., 0].numel()
        agreeing += int((again.sort(-1).values == record.expert_ids.sort(-1).values).all(-1).sum())
    assert agreeing >= 0.99 * places


def test_an_encoder_decoder_writes_all_of_its_own(switch_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    collect(switch_dir, TEXT, tmp_path / "trace", generation=Generation(4))
    for record in by_name(tmp_path / "trace").values():
        assert record.phase[0] == Phase.PREFILL
        assert set(record.phase[1:].tolist()) <= {int(Phase.DECODE)}
        assert len(record) <= 5
    with pytest.raises(SpecmoeError, match="an encoder writes nothing"):
        collect(switch_dir, TEXT, tmp_path / "other", generation=Generation(4), stack="encoder")


def test_a_text_that_ends_is_cut_before_its_end(olmoe_dir: Path) -> None:  # noqa: F811
    loaded = load_model(olmoe_dir)
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
    loaded.model.generation_config.eos_token_id = None
    with torch.inference_mode():
        free = loaded.model.generate(torch.tensor([prompts[0]]), max_new_tokens=6, do_sample=False)[0, 4:].tolist()
    end = free[3]
    loaded.model.generation_config.eos_token_id = [end]
    with torch.inference_mode(), recorded_routes(loaded.model, loaded.family) as recorder:
        written = run_generation(loaded.model, loaded.family, prompts, Generation(6), 0)
    routes = join(recorder.take(), 3, written)
    assert written[0] == free.index(end)
    assert routes.lengths == [len(prompt) + count for prompt, count in zip(prompts, written, strict=True)]
    first = routes.token_ids[: routes.lengths[0]].tolist()
    assert first == prompts[0] + free[: free.index(end)]
    assert end not in routes.token_ids.tolist()
    assert all(len(layer.ids) == sum(routes.lengths) for layer in routes.layers)


def test_sampling_follows_its_seed(olmoe_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        collect(olmoe_dir, TEXT, tmp_path / name, generation=Generation(8, temperature=1.0, seed=seed))
    a, b, c = (by_name(tmp_path / name) for name in "abc")
    assert all(identical(a[name], b[name]) for name in a)
    assert any(not identical(a[name], c[name]) for name in a)


def test_a_continued_run_writes_what_a_whole_one_does(olmoe_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    generation = Generation(6, temperature=1.0)
    collect(olmoe_dir, TEXT, tmp_path / "whole", generation=generation, batch_tokens=64)

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(olmoe_dir, TEXT, tmp_path / "cut", generation=generation, batch_tokens=64, on_progress=stop)
    assert 0 < len(Trace.open(tmp_path / "cut", allow_incomplete=True)) < len(TEXT)
    collect(olmoe_dir, TEXT, tmp_path / "cut", generation=generation, batch_tokens=64)
    whole, cut = by_name(tmp_path / "whole"), by_name(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(identical(whole[name], cut[name]) for name in whole)


def test_the_verb(olmoe_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    text = tmp_path / "text"
    text.mkdir()
    for document in TEXT:
        (text / f"{document.doc_id}.txt").write_text(document.text)
    arguments = ["collect", "--model", str(olmoe_dir), "--text", str(text), "--out", str(tmp_path / "t"), "--json"]
    assert run_verb([*arguments, "--generate", "3"]) == 0
    settings = json.loads(capsys.readouterr().out)["source"]["settings"]
    assert (settings["generate"], settings["temperature"]) == (3, 0.0)
    # Another way of running is another trace.
    assert run_verb([*arguments, "--generate", "4"]) == 2
    assert "holds another trace" in capsys.readouterr().err
    assert run_verb([*arguments, "--generate", "0"]) == 2
    assert run_verb([*arguments, "--temperature", "-1", "--generate", "2"]) == 2
    assert run_verb([*arguments, "--generate", "100000"]) == 2
    assert "or --generate from 100000" in capsys.readouterr().err


def test_a_model_without_a_head_writes_nothing() -> None:
    model = tiny_model("qwen3_vl_moe")
    from specmoe.sources.families import family_of

    with pytest.raises(SpecmoeError, match="writes no text"):
        run_generation(model, family_of("qwen3_vl_moe"), [[3, 4]], Generation(2), 0)
