"""Steps that several verbs take, with their progress shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specmoe.cli.progress import ProgressLine, TrainingView
from specmoe.files import regular_file
from specmoe.results import Results
from specmoe.sources.capture import CaptureProgress, collect
from specmoe.sources.corpus import Document

__all__ = ["collect_trace", "token_texts", "train_on"]


def collect_trace(model: str, documents: Sequence[Document], out: Path, *, title: str, **options: Any) -> None:
    """Capture with a progress bar; the model ``bundled`` is the one that ships with the package."""
    from specmoe.sources.bundled import bundled_model

    with ProgressLine(title) as line:

        def show(progress: CaptureProgress) -> None:
            note = f"{progress.tokens_per_second:,.0f} tokens/s, {progress.bytes / 1e6:,.0f} MB"
            line.update(progress.tokens, progress.tokens_total, note)

        name = bundled_model() if model == "bundled" else model
        collect(name, documents, out, on_progress=show, on_note=line.say, **options)


def train_on(trace: Path, out: Path, names: Sequence[str], **options: Any) -> Results:
    """Train a suite with the live view."""
    from specmoe.suite.train import train_suite

    with TrainingView() as view:
        return train_suite(
            trace,
            out,
            names,
            token_texts=token_texts(trace),
            on_plan=view.plan,
            on_event=view.event,
            on_stage=view.stage,
            **options,
        )


def token_texts(trace: Path) -> Callable[[list[int]], list[str]] | None:
    """Token ids → texts by the tokenizer that lies beside a trace, None if there is none."""
    path = trace / "tokenizer.json"
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(json.loads(regular_file(path).read_text(encoding="utf-8"))))
    return lambda ids: [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
