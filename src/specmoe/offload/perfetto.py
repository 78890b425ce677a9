"""A timeline for ui.perfetto.dev and chrome://tracing: the Trace Event Format, complete events ("X") in µs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specmoe.files import write_json
from specmoe.offload.hardware.profile import Hardware
from specmoe.offload.simulation.state import DEMAND, EXPERTS, LAYER, STALL, Log
from specmoe.topology import Topology

__all__ = ["timeline_events", "write_timeline"]

_COMPUTE, _STALL, _LINKS = 1, 2, 10
# Lanes of a link: as many transfers as it runs at once.
_MOST_LANES = 1000


def write_timeline(log: Log, hardware: Hardware, topology: Topology, path: Path, *, title: str) -> None:
    """Write the spans of a log as a file that trace viewers open.

    Raises:
        SpecmoeError: the file cannot be written.
    """
    content = {"displayTimeUnit": "ms", "traceEvents": timeline_events(log, hardware, topology, title)}
    write_json(path, content, indent=None)


def timeline_events(log: Log, hardware: Hardware, topology: Topology, title: str) -> list[dict[str, Any]]:
    """One event a span: computing and waiting on a lane each, transfers on as many lanes a link as overlap.

    Times and durations are µs. Names are ``layer 3``, ``experts of layer 3``, ``waits in layer 3`` and
    ``expert 3/17`` (layer/expert); ``args.event`` is the event's number.
    """
    names = {_COMPUTE: "computing", _STALL: "waiting for experts"}
    ends: dict[int, list[float]] = {}
    events = []
    size = int(log.size[0])
    order = log.when[:size, 0].argsort(kind="stable")
    rows = zip(log.what[:size][order].tolist(), log.when[:size][order].tolist(), strict=True)
    for (kind, level, number, event), (begin, end) in rows:
        if kind in {LAYER, EXPERTS, STALL}:
            name = {LAYER: "layer {}", EXPERTS: "experts of layer {}", STALL: "waits in layer {}"}[kind].format(number)
            lane, category = (_STALL, "stall") if kind == STALL else (_COMPUTE, "compute")
        else:
            # With three tiers level 1 is the link into the host; with two, the only link has level 2.
            link = hardware.links[-1] if level == 2 else hardware.links[0]
            free = ends.setdefault(level, [])
            place = next((i for i, until in enumerate(free) if until <= begin), len(free))
            free[place : place + 1] = [end]
            lane = _LINKS + level * _MOST_LANES + place
            names.setdefault(lane, link.name if place == 0 else f"{link.name}, {place + 1}")
            name = "expert {}/{}".format(*divmod(number, topology.experts))
            category = "demand" if kind == DEMAND else "prefetch"
        events.append(
            {
                "name": name,
                "cat": category,
                "ph": "X",
                "ts": 1e6 * begin,
                "dur": 1e6 * (end - begin),
                "pid": 1,
                "tid": lane,
                "args": {"event": event},
            }
        )
    facts = [_fact("process_name", 1, 0, name=title)]
    for place, (lane, name) in enumerate(sorted(names.items())):
        facts += [_fact("thread_name", 1, lane, name=name), _fact("thread_sort_index", 1, lane, sort_index=place)]
    return [*facts, *events]


def _fact(kind: str, process: int, thread: int, **values: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "ts": 0, "pid": process, "tid": thread, "args": values}
