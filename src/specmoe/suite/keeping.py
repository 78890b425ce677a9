"""What a folder already holds: results of earlier calls are taken over, and never replaced unasked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specmoe.errors import SpecmoeError
from specmoe.predictors.recipes import Recipes
from specmoe.predictors.registry import PREDICTORS
from specmoe.results import PredictorResult, Results
from specmoe.suite.data import SuiteData, trace_fingerprint
from specmoe.suite.jobs import Job, finished, job_fingerprint, vouched
from specmoe.trace import Trace

__all__ = ["Earlier"]

_CURE = "choose another --out, or give --replace to lose them"


@dataclass(frozen=True)
class Earlier:
    """The results that lie in a folder, and what is asked for now.

    Attributes:
        out: the folder. results: what lies there, None if nothing does or it is to be replaced.
        names: predictors asked for. replace: whether other runs may be overwritten.
    """

    out: Path
    results: Results | None
    names: tuple[str, ...]
    replace: bool

    @classmethod
    def of(cls, out: Path, names: Sequence[str], *, replace: bool = False) -> Earlier:
        """Look into a folder.

        Raises:
            SpecmoeError: what lies there cannot be read, or is of predictors that this version does not know.
        """
        path = out / "results.json"
        if replace or not path.exists():
            return cls(out, None, tuple(names), replace)
        try:
            results = Results.load(path)
        except SpecmoeError as error:
            raise SpecmoeError(f"{error}; training there would replace it: {_CURE}") from error
        unknown = [predictor.name for predictor in results.predictors if predictor.name not in PREDICTORS]
        if unknown:
            raise SpecmoeError(f"{path} holds results of {', '.join(unknown)}, which this specmoe lacks; {_CURE}")
        return cls(out, results, tuple(names), replace)

    @property
    def kept(self) -> tuple[PredictorResult, ...]:
        """Those that were run before and are not asked for now."""
        return tuple(p for p in self.results.predictors if p.name not in self.names) if self.results else ()

    @property
    def all_names(self) -> list[str]:
        """Predictors asked for and kept, in the registry's order if there are any to keep."""
        wanted = {*self.names, *(predictor.name for predictor in self.kept)}
        return [name for name in PREDICTORS if name in wanted] if self.kept else list(self.names)

    def recipes(self, asked: Recipes) -> dict[str, dict[str, Any]]:
        """The recipes asked for; of those that are kept, the ones that they were trained by."""
        kept = {predictor.name: dict(predictor.recipe) for predictor in self.kept}
        return {**{name: dict(values) for name, values in asked.items()}, **kept}

    def check(self, data: SuiteData, jobs: Sequence[Job], seeds: Sequence[int], control: Path | None) -> None:
        """Make sure that nothing is lost when these jobs are run and their results written.

        Args:
            data: under :meth:`recipes`. jobs: of :attr:`all_names`. control: trace of the untrained model, or None.

        Raises:
            SpecmoeError: results or finished runs lie there that were made under other settings; says which.
        """
        if self.replace:
            return
        path = self.out / "results.json"
        if self.results is not None:
            differing = self._differing(self.results, data, seeds, control)
            if differing:
                raise SpecmoeError(f"{path} was made under other settings ({'; '.join(differing)}); {_CURE}")
        kept = {predictor.name for predictor in self.kept}
        for job in jobs:
            fingerprint = job_fingerprint(job, data)
            if finished(job, self.out, fingerprint) is not None:
                continue
            if _is_done(job, self.out):
                raise SpecmoeError(
                    f"{job.folder(self.out)} was trained under other settings (trace, horizons, cache, recipe, or a "
                    f"version of torch or specmoe); {_CURE}"
                )
            if job.predictor in kept:
                raise SpecmoeError(f"{path} has results of {job.predictor}, whose run is no longer in jobs/; {_CURE}")

    def _differing(self, results: Results, data: SuiteData, seeds: Sequence[int], control: Path | None) -> list[str]:
        protocol, torch_then = results.protocol, results.made.versions.get("torch", "unknown")
        # More seeds of the same predictors lose nothing.
        more = set(protocol.seeds) < set(seeds) and not any(predictor.learned for predictor in self.kept)
        pairs = [
            ("trace", results.trace.fingerprint, trace_fingerprint(data.trace)),
            ("split", results.split.hash, data.split.hash),
            ("horizons", _listed(protocol.horizons), _listed(data.horizons)),
            ("experts in the cache", protocol.cache_experts, data.cache_experts),
            ("seeds", _listed(protocol.seeds), _listed(protocol.seeds if more else seeds)),
            ("torch", torch_then, torch.__version__),
        ]
        if control is not None and results.control_trace is not None:
            pairs.append(("control", results.control_trace.fingerprint, trace_fingerprint(Trace.open(control))))
        for predictor in results.predictors:
            now = json.loads(json.dumps(data.recipes.get(predictor.name, {})))
            pairs.append((f"recipe of {predictor.name}", json.dumps(predictor.recipe), json.dumps(now)))
        return [f"{what}: {then} there, {now} here" for what, then, now in pairs if then != now]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _is_done(job: Job, out: Path) -> bool:
    """Whether a finished run lies in a job's folder, under whatever settings."""
    content = vouched(job.folder(out))
    result = content.get("result") if content is not None else None
    return isinstance(result, dict) and result.get("status", "ok") == "ok"
