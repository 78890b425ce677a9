"""Train all speculation models and compare them: the original command, a thin door to ``specmoe train``.

Reads ``routing_data/robust_traces.pkl`` if it is there, else captures the demonstration's trace. Writes the
trained models to ``trained_models/`` and the results to ``results/``. Further arguments go to ``specmoe train``.
"""

from __future__ import annotations

import datetime
import shutil
import sys
from pathlib import Path

from specmoe.cli import run_verb

LEGACY = Path("routing_data/robust_traces.pkl")
MODELS = Path("trained_models")
RESULTS = Path("results")


def main() -> int:
    """Import or capture, train, and keep the results under a name with the time in it."""
    trace = MODELS / ("imported-trace" if LEGACY.exists() else "demo-trace")
    if LEGACY.exists():
        code = run_verb(["import", str(LEGACY), "--out", str(trace)])
    else:
        code = run_verb(["collect", "--out", str(trace)])
    code = code or run_verb(["train", str(trace), "--out", str(MODELS), *sys.argv[1:]])
    if code == 0:
        RESULTS.mkdir(exist_ok=True)
        stamp = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
        for suffix in ("json", "html"):
            source = MODELS / ("results.json" if suffix == "json" else "report.html")
            target = RESULTS / f"comprehensive_speculation_training_{stamp}.{suffix}"
            shutil.copyfile(source, target)
            print(f"wrote {target}")
    return code


if __name__ == "__main__":
    sys.exit(main())
