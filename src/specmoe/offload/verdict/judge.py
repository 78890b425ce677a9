"""The whole of ``specmoe verdict``: the simulation, what it needs besides, the answer, and the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specmoe.files import write_json, write_text
from specmoe.locks import writes
from specmoe.offload.admission.registry import parse_admission
from specmoe.offload.demand import Demand
from specmoe.offload.prefetchers.predictions import Predictions
from specmoe.offload.running import Simulator
from specmoe.offload.study import Settings, chosen_documents, machine_of, opened, simulate_trace
from specmoe.offload.verdict.decide import Verdict, decide
from specmoe.offload.verdict.evidence import Evidence, evidence_of
from specmoe.offload.verdict.sensitivity import measure_sensitivity
from specmoe.offload.verdict.words import verdict_page
from specmoe.suite.data import trace_fingerprint

__all__ = ["Judged", "judge"]


@dataclass(frozen=True)
class Judged:
    """evidence: the numbers. verdict: the answer. page: both in words."""

    evidence: Evidence
    verdict: Verdict
    page: str

    def as_json(self) -> dict[str, Any]:
        """Answer by name, exit code, and everything that it rests on."""
        content = self.verdict.model_dump(mode="json") | {
            "answer": self.verdict.answer.name.lower(),
            "exit_code": self.verdict.answer.value,
        }
        return {**content, "evidence": self.evidence.model_dump(mode="json")}


@writes("verdict")
def judge(
    trace: Path,
    out: Path,
    settings: Settings,
    *,
    run: Path | None = None,
    worth: float,
    device: str = "cpu",
    on_stage: Callable[[str], None] = lambda _: None,
    on_run: Callable[[int, int, str], None] = lambda *_: None,
) -> Judged:
    """Simulate, judge, and write ``verdict.md`` and ``verdict.json`` to ``out``. Killed and started again it goes on.

    Args:
        worth: gain in tokens a second that makes prefetching worth it.

    Raises:
        SpecmoeError: as :func:`specmoe.offload.study.simulate_trace`.
    """
    results = simulate_trace(trace, out, settings, run=run, device=device, on_stage=on_stage, on_run=on_run)
    found = opened(trace, settings, run, on_stage)
    candidates, horizons = found.candidates, found.horizons
    documents = chosen_documents(found, settings.max_tokens)
    demand = Demand.of_trace(
        found.trace, documents, replay=settings.replay, batch=settings.batch, prefill_chunk=settings.prefill_chunk
    )
    machine = machine_of(settings, found.trace.topology)
    simulator = Simulator(found.trace, documents, demand, machine, horizons, candidates, device, on_stage)

    def foreseen() -> Predictions:
        return simulator.predictions_of(candidates[0].name)

    on_stage("other links, caches and sizes")
    sensitivity = measure_sensitivity(
        demand,
        machine,
        settings.policy,
        horizons,
        foreseen if candidates else None,
        parse_admission(results.admission, found.trace.topology.top_k),
        candidates[0].seconds if candidates else 0.0,
        out / "sensitivity.json",
        repr(
            (
                trace_fingerprint(found.trace),
                documents,
                candidates[0].identity if candidates else "",
                demand.replay,
                demand.batch,
            )
        ),
        on_run=on_run,
    )
    evidence = evidence_of(results, sensitivity)
    verdict = decide(evidence, worth)
    judged = Judged(evidence, verdict, verdict_page(evidence, verdict))
    write_text(out / "verdict.md", judged.page)
    write_json(out / "verdict.json", judged.as_json())
    return judged
