"""``specmoe collect`` and ``specmoe import``: how traces come into being."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specmoe.cli.options import LARGEST_SEED, AsJson, Device, Out, finite, print_json, resolve_device
from specmoe.errors import SpecmoeError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("collect")(collect)
    app.command("import")(import_)


def collect(
    out: Out,
    model: Annotated[
        str, typer.Option(help="Directory or hub id (specmoe families lists what can be); 'bundled' needs no download.")
    ] = "bundled",
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Files, folders (text, or rows and chats as JSONL, JSON, CSV, Parquet), or hub:NAME of a dataset; "
            "default: the held-out standard library."
        ),
    ] = None,
    tokens_per_document: Annotated[int, typer.Option(min=2, max=1 << 30, help="Each document is cut there.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after so many tokens.")] = None,
    keep_hidden: Annotated[str, typer.Option(help="Router inputs: all, none, or sample:0.1 of the documents.")] = "all",
    hidden_dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    stack: Annotated[str | None, typer.Option(help="Of an encoder-decoder: decoder (default) or encoder.")] = None,
    generate: Annotated[
        int | None, typer.Option(min=1, max=1 << 20, help="Let the model continue each document by so many tokens.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="Of --generate; 0 takes the likeliest token.")
    ] = 0.0,
    untrained: Annotated[bool, typer.Option(help="Random weights of the same shape, as a control.")] = False,
    seed: Annotated[
        int,
        typer.Option(min=-LARGEST_SEED, max=LARGEST_SEED, help="Order of documents, and the weights of --untrained."),
    ] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as stored.")] = "float32",
    device: Device = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Spread over several GPUs: auto, balanced, sequential (needs accelerate).")
    ] = None,
    json: AsJson = False,
) -> None:
    """Let a model read text, and continue it if asked to, and write its routing to a trace."""
    from specmoe.cli.steps import collect_trace
    from specmoe.sources.corpus import standard_library
    from specmoe.sources.generation import Generation
    from specmoe.sources.texts import read_texts
    from specmoe.trace import Trace

    documents = read_texts(text, _note) if text else standard_library("held-out")
    collect_trace(
        model,
        documents,
        out,
        title="reading" if not untrained else "reading, untrained",
        max_tokens_per_document=tokens_per_document,
        max_tokens=max_tokens,
        keep_hidden=keep_hidden,
        hidden_dtype=hidden_dtype,
        stack=stack,
        untrained=untrained,
        seed=seed,
        generation=Generation(generate, temperature, seed) if generate is not None else None,
        dtype=dtype,
        device=resolve_device(device),
        device_map=device_map,
    )
    _tell(Trace.open(out), json)


def _note(line: str) -> None:
    typer.echo(f"note: {line}", err=True)


def import_(
    source: Annotated[Path, typer.Argument(help="File or folder to import.")],
    out: Out,
    format: Annotated[
        str | None, typer.Option(help="Name of the format, as specmoe formats lists them; default: recognised.")
    ] = None,
    model_id: Annotated[str, typer.Option(help="Name of the model that was traced.")] = "unknown",
    experts: Annotated[
        str,
        typer.Option(help="Experts in a layer, where the file does not say; with commas one for each MoE layer."),
    ] = "",
    axes: Annotated[
        str | None,
        typer.Option(help="Axes of arrays of experts, in order, such as layers,tokens,k; default: tokens,layers,k."),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(help="Keep together in a split what has the same FIELD: one of a request, or file or folder."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--map", help="Of rows under other names: layer=layer_idx,experts=topk_ids,token=pos,document=req_id,..."
        ),
    ] = None,
    json: AsJson = False,
) -> None:
    """Turn somebody else's routing data into a trace; says what looks wrong with it."""
    from specmoe.cli.progress import ProgressLine
    from specmoe.sources.importers import ImportOptions, column_map, import_trace
    from specmoe.sources.importers.axes import axes_of
    from specmoe.trace import Trace

    counts = _experts(experts)
    options = ImportOptions(
        model_id=model_id,
        experts=max(counts, default=None),
        experts_per_layer=counts if len(counts) > 1 else None,
        axes=None if axes is None else axes_of(axes),
        group_by=group_by,
        columns=column_map(columns or ()),
    )
    with ProgressLine("importing") as line:
        warnings = import_trace(source, out, format=format, options=options, on_progress=line.update)
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    _tell(Trace.open(out), json, warnings=warnings)


def _tell(trace: object, as_json: bool, warnings: list[str] | None = None) -> None:
    from specmoe.suite.assemble import trace_facts
    from specmoe.trace import Trace

    assert isinstance(trace, Trace)
    facts = trace_facts(trace)
    if as_json:
        print_json(facts.model_dump(mode="json") | ({"warnings": warnings} if warnings is not None else {}))
        return
    shape = facts.topology
    typer.echo(
        f"{trace.directory}: {facts.tokens:,} tokens in {facts.documents} documents of {facts.domains} domains, "
        f"{shape.layers} MoE layers × {shape.experts_text} experts, top-{shape.top_k}; keeps {', '.join(facts.fields)}"
    )


def _experts(text: str) -> tuple[int, ...]:
    """``64`` or, one for each MoE layer, ``56,40,28``; empty where nothing is said."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() and 1 <= int(part) <= 32767 for part in parts):
        raise SpecmoeError(f"--experts {text!r} cannot be read; give a number like 64, or one for each layer: 56,40,28")
    return tuple(map(int, parts))
