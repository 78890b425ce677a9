"""Telling requests apart in forward passes of SGLang, which say of a token its position but not its request.

What is known: a prefill pass says how many tokens each of its requests has; a decode pass has one token of every
running request; requests keep their order in the batch; and a prompt that is computed in chunks is the last of one
prefill pass and the first of the next. So

- a prefill that begins where the chunk at the end of the pass before ended continues it; any other begins a request;
- a decoded token at position p continues the request whose next position is p. Where several requests wait for the
  same position, all of them must go on, else it is unknown which did, and each token begins a part of its own;
- a request that a decode pass leaves out is finished.

What cannot be told apart becomes a shorter document. One case is beyond this: in a mixed pass, a prompt that was cached
but for one token looks like a decoded token, and is taken for one where a request that has just finished waited for its
position.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

__all__ = ["DECODE", "EXTEND", "MIXED", "Pass", "Segment", "Stream", "tell_apart"]

# Values of sglang.srt.model_executor.forward_batch_info.ForwardMode that have been the same in all versions.
EXTEND, DECODE, MIXED = 1, 2, 3


@dataclass(frozen=True)
class Pass:
    """One forward pass: N tokens of several requests.

    Attributes:
        mode: :data:`EXTEND`, :data:`DECODE` or :data:`MIXED`. positions: [N], of each token in its request.
        lengths: tokens of each request, in order; they add up to N.
    """

    mode: int
    positions: np.ndarray
    lengths: list[int]


@dataclass(frozen=True)
class Segment:
    """Tokens ``start`` to ``stop`` of pass ``index``."""

    index: int
    start: int
    stop: int
    decoded: bool


@dataclass(eq=False)
class Stream:
    """One request, or as much of it as can be told apart.

    Attributes:
        segments: in order. expected: the next position; -1 if it cannot be continued.
    """

    segments: list[Segment] = field(default_factory=list)
    expected: int = -1

    def add(self, segment: Segment, positions: np.ndarray) -> None:
        """Append tokens at ``positions``."""
        self.segments.append(segment)
        part = positions[segment.start : segment.stop]
        in_row = len(part) > 0 and bool((np.diff(part) == 1).all())
        self.expected = int(part[-1]) + 1 if in_row else -1


def tell_apart(passes: list[Pass]) -> list[Stream]:
    """All requests, in the order in which they begin."""
    streams: list[Stream] = []
    running: list[Stream] = []
    chunk: Stream | None = None
    for index, one in enumerate(passes):
        ends = np.cumsum(one.lengths).tolist()
        parts = [(end - length, end) for end, length in zip(ends, one.lengths, strict=True) if length]
        decoded = parts if one.mode == DECODE else []
        if one.mode == MIXED:
            decoded, parts = _decoded_in_mixed(parts, one.positions, running)
        if one.mode in (EXTEND, MIXED):
            fresh, chunk = _prefill(index, one, parts, chunk)
            streams += [stream for stream in fresh if len(stream.segments) == 1]
        else:
            fresh = []
        if one.mode in (DECODE, MIXED):
            running, begun = _decode(index, one, decoded, running)
            streams += begun
        running += [stream for stream in fresh if stream not in running]
    return streams


def _decoded_in_mixed(
    parts: list[tuple[int, int]], positions: np.ndarray, running: list[Stream]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """In a mixed pass the decoded tokens stand behind at least one prefill, as prefills of length 1."""
    waiting = {stream.expected for stream in running}
    first = len(parts)
    while (
        first > 1 and parts[first - 1][1] - parts[first - 1][0] == 1 and int(positions[parts[first - 1][0]]) in waiting
    ):
        first -= 1
    return parts[first:], parts[:first]


def _prefill(
    index: int, one: Pass, parts: list[tuple[int, int]], chunk: Stream | None
) -> tuple[list[Stream], Stream | None]:
    touched: list[Stream] = []
    for number, (start, stop) in enumerate(parts):
        continues = number == 0 and chunk is not None and chunk.expected == int(one.positions[start]) > 0
        stream = chunk if continues and chunk is not None else Stream()
        stream.add(Segment(index, start, stop, decoded=False), one.positions)
        touched.append(stream)
    return touched, touched[-1] if touched else None


def _decode(
    index: int, one: Pass, parts: list[tuple[int, int]], running: list[Stream]
) -> tuple[list[Stream], list[Stream]]:
    """The requests that run on, in batch order, and those of them that begin here."""
    waiting: dict[int, list[Stream]] = defaultdict(list)
    for stream in running:
        if stream.expected >= 0:
            waiting[stream.expected].append(stream)
    arrived: dict[int, list[int]] = defaultdict(list)
    for number, (start, _) in enumerate(parts):
        arrived[int(one.positions[start])].append(number)
    chosen: list[Stream] = [Stream() for _ in parts]
    begun: list[Stream] = []
    for position, numbers in arrived.items():
        candidates = waiting.get(position, [])
        if len(candidates) == len(numbers):
            for number, stream in zip(numbers, candidates, strict=True):
                chosen[number] = stream
        else:
            begun += [chosen[number] for number in numbers]
    for stream, (start, stop) in zip(chosen, parts, strict=True):
        stream.add(Segment(index, start, stop, decoded=True), one.positions)
    return chosen, begun
