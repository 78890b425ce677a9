"""Write the tables of README.md and docs/ from run files, between their markers: no figure is typed by hand.

Usage: python scripts/update_readme.py (reads docs/runs/*.json)
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from specmoe.results import Interval, Results

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Fill every marked block."""
    results = Results.load(ROOT / "docs" / "runs" / "demo.json")
    blocks = {"ranking": ranking(results), "made": made(results)}
    benchmarks = ROOT / "docs" / "runs" / "benchmarks.json"
    if benchmarks.exists():
        blocks["benchmarks"] = benchmark_table(json.loads(benchmarks.read_text(encoding="utf-8")))
    fill(ROOT / "README.md", blocks)
    ablations = ROOT / "docs" / "runs" / "ablations.json"
    if ablations.exists():
        content = json.loads(ablations.read_text(encoding="utf-8"))
        fill(ROOT / "docs" / "ablations.md", {"ablations": ablation_table(content), "made": ablations_made(content)})


def fill(path: Path, blocks: dict[str, str]) -> None:
    """Replace what stands between the markers of each block."""
    text = path.read_text(encoding="utf-8")
    for name, content in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _, c=content, b=begin, e=end: f"{b}\n{c}\n{e}", text, flags=re.DOTALL)
    path.write_text(text, encoding="utf-8")


def ranking(results: Results) -> str:
    """recall@K of every predictor with its interval, best first at the first horizon."""
    horizons = results.protocol.horizons
    finished = [p for p in results.predictors if p.status == "ok"]
    finished.sort(key=lambda p: -p.scores["recall@K"][horizons[0]].value)
    head = ["predictor", "category", "parameters", *(f"h = {h}" for h in horizons), "over ridge, h = 1", "h = 3", "µs"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    for p in finished:
        name = f"**{p.name}**" if p.learned else p.name
        size = f"{p.parameters:,}" if p.learned else "–"
        recalls = [percent(p.scores["recall@K"][h]) for h in horizons]
        over = [points(p.over_ridge.get(h)) for h in (1, 3)]
        latency = f"{p.latency.p50_us:,.0f}" if p.latency else "–"
        lines.append("| " + " | ".join([name, p.category, size, *recalls, *over, latency]) + " |")
    return "\n".join(lines)


def made(results: Results) -> str:
    """One sentence on where the table comes from."""
    facts, split = results.trace, results.split
    return (
        f"recall@K in % on the test part with half the width of its 95 % interval ({split.tokens['test']:,} tokens of "
        f"{split.documents['test']} documents, {len(results.protocol.seeds)} seeds, bootstrap over documents and "
        f"seeds); K = {facts.topology.top_k} of {facts.topology.experts} experts. Made by `{results.made.command}` on "
        f"{results.made.date[:10]} ({results.made.hardware['cores']} cores), trained and judged in "
        f"{results.made.seconds:.0f} s; run file: "
        "[docs/runs/demo.json](docs/runs/demo.json)."
    )


def benchmark_table(runs: dict[str, dict[str, str]]) -> str:
    """Claim, figure and command of each benchmark."""
    lines = ["| what | measured | goal | command |", "|---|---|---|---|"]
    lines += [f"| {r['what']} | {r['measured']} | {r['goal']} | `{r['command']}` |" for r in runs.values()]
    return "\n".join(lines)


def ablation_table(content: dict[str, Any]) -> str:
    """Each change with its recall, and its gain over the recipe in force at the first and last horizon."""
    rows = list(content["rows"].values())
    horizons = list(rows[0]["recall"])
    first, last = horizons[0], horizons[-1]
    head = ["change", *(f"h = {h}" for h in horizons), f"gain, h = {first}", f"h = {last}", "parameters", "s"]
    lines = []
    for name in dict.fromkeys(row["predictor"] for row in rows):
        lines += ["", f"**{name}**", "", "| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
        for row in rows:
            if row["predictor"] == name:
                gains = [Interval(**row["gain"][h]) if "gain" in row else None for h in (first, last)]
                recalls = [f"{100 * row['recall'][h]:.1f}" for h in horizons]
                cells = [row["change"], *recalls, *map(points, gains), f"{row['parameters']:,}"]
                lines.append("| " + " | ".join([*cells, f"{row['train_seconds']:.0f}"]) + " |")
    return "\n".join(lines[1:])


def ablations_made(content: dict[str, Any]) -> str:
    """One sentence on where the table comes from."""
    made = content["made"]
    return (
        f"recall@K in % on the {content['documents']} validation documents of the demo's trace, mean of "
        f"{content['seeds']} seeds; gains in points with 95 % intervals (documents and seeds resampled, paired); s: "
        f"seconds of one training on one core, beside other work. Made by `benchmarks/ablations.py` on "
        f"{made['date'][:10]}; run file: [runs/ablations.json](runs/ablations.json)."
    )


def percent(interval: Interval) -> str:
    """Estimate and half-width in %."""
    half = (interval.high - interval.low) / 2
    return f"{100 * interval.value:.1f} ± {100 * half:.1f}"


def points(interval: Interval | None) -> str:
    """A difference in points with its interval."""
    if interval is None:
        return "–"
    return f"{100 * interval.value:+.1f} ({100 * interval.low:+.1f} … {100 * interval.high:+.1f})"


if __name__ == "__main__":
    main()
