"""The one on-disk form of routing: a directory of checksummed, memory-mapped shards."""

from specmoe.trace.manifest import DocumentRecord, Manifest, Source, Timing
from specmoe.trace.reader import Trace
from specmoe.trace.record import FIELDS, Phase, RoutingRecord
from specmoe.trace.writer import TraceWriter

__all__ = [
    "FIELDS",
    "DocumentRecord",
    "Manifest",
    "Phase",
    "RoutingRecord",
    "Source",
    "Timing",
    "Trace",
    "TraceWriter",
]
