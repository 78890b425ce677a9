"""Damaging files at random and reading them: only our own error may come out, and memory stays bounded.

Run as a script it prints one JSON object per failure; the tests run it in a process of its own, whose memory is
limited, so that a crash of a library is noticed too: the report then ends with what was about to be read.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from importers import array_samples, text_samples
from specmoe.checkpoint import load_checkpoint, save_checkpoint
from specmoe.errors import SpecmoeError
from specmoe.results import Results
from specmoe.sources.importers import IMPORTERS, import_trace, recognise
from specmoe.topology import Topology
from specmoe.trace import Manifest, RoutingRecord, Source, Trace, TraceWriter

__all__ = ["TARGETS", "Target", "run"]

# Above what the process needs anyway: a writer's buffers, address space only, take most of it.
MEMORY_BYTES = 3 << 29
SLOW_SECONDS = 10.0

Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """A reader and a file or folder that it reads.

    Attributes:
        build: writes a sample below a folder and returns its path. read: reads it.
    """

    build: Callable[[Path], Path]
    read: Callable[[Path, Path], None]


# --- what is read ----------------------------------------------------------------------------------------


def _import_as(name: str) -> Callable[[Path, Path], None]:
    def read(path: Path, scratch: Path) -> None:
        recognise_quietly(path)
        import_trace(path, scratch / "trace", format=name)
        Trace.open(scratch / "trace").verify()

    return read


def _text_sample(name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        file, text = text_samples.SAMPLES[name]
        (folder / file).write_bytes(text().encode())
        return folder / file

    return build


def _gating_pickle(folder: Path) -> Path:
    from test_gating_pickle import points, write

    return write(folder / "traces.pkl", points(texts=4, length=6))


def _trace(folder: Path) -> Path:
    shape = Topology(model_id="m", layers=2, experts=4, top_k=2, hidden_size=3)
    fields = ("token_ids", "phase", "expert_ids", "gate_weights", "router_logits", "hidden")
    with TraceWriter(folder / "trace", Manifest(topology=shape, source=Source(kind="x"), fields=fields)) as writer:
        writer.keep_routers(torch.ones(2, 4, 3), torch.zeros(2, 4))
        for number, tokens in enumerate((3, 5)):
            record = RoutingRecord(
                token_ids=torch.arange(tokens, dtype=torch.int32),
                phase=torch.zeros(tokens, dtype=torch.uint8),
                expert_ids=torch.ones(tokens, 2, 2, dtype=torch.int16),
                gate_weights=torch.ones(tokens, 2, 2),
                router_logits=torch.ones(tokens, 2, 4),
                hidden=torch.ones(tokens, 2, 3).half(),
            )
            writer.add(f"d{number}", "a", "0", record)
    return folder / "trace"


def _read_trace(path: Path, scratch: Path) -> None:
    recognise_quietly(path)
    trace = Trace.open(path)
    trace.verify()
    trace.routers()


def recognise_quietly(path: Path) -> None:
    """No importer may fail at looking at a file."""
    with contextlib.suppress(SpecmoeError):
        recognise(path)


def _checkpoint(folder: Path) -> Path:
    state = {"step": 3, "lr": 0.5, "names": ["a", None, True], "state": {"0": {"exp": torch.ones(4, 3)}}}
    save_checkpoint(folder / "state.safetensors", state)
    return folder / "state.safetensors"


def _results(folder: Path) -> Path:
    from results_fixture import bare_results

    bare_results().save(folder / "results.json")
    return folder / "results.json"


def _tables(folder: Path) -> Path:
    """Rows in several forms: packed, in UTF-16, layers within tokens."""
    path = folder / "tables"
    path.mkdir()
    rows = text_samples.foreign_rows(text_samples.routing(8))
    nested = [{"pos": pos, "layers": [row for row in rows if row["pos"] == pos]} for pos in range(8)]
    (path / "a.csv").write_text(text_samples.table(rows))
    (path / "b.tsv").write_text(text_samples.table(text_samples.activations(rows), delimiter="\t"), encoding="utf-16")
    (path / "c.jsonl.gz").write_bytes(gzip.compress(text_samples.jsonl(rows).encode(), mtime=0))
    (path / "d.jsonl").write_text(text_samples.jsonl(nested))
    return path


_SAMPLES: dict[str, Callable[[Path], Path]] = {
    "gating-pickle": _gating_pickle,
    **array_samples.SAMPLES,
    **{name: _text_sample(name) for name in text_samples.SAMPLES},
}
TARGETS: dict[str, Target] = {
    **{name: Target(build, _import_as(name)) for name, build in _SAMPLES.items() if name in IMPORTERS},
    **{f"{name}-{form}": Target(build, _import_as(name)) for (name, form), build in array_samples.FORMS.items()},
    "rows-packed": Target(_tables, _import_as("rows")),
    "trace": Target(_trace, _read_trace),
    "checkpoint": Target(_checkpoint, lambda path, _: load_checkpoint(path)),
    "results": Target(_results, lambda path, _: Results.load(path)),
}


# --- damage ----------------------------------------------------------------------------------------------

_NUMBERS = re.compile(rb"-?\d+(?:\.\d+)?")
_TEXTS = [b"-1", b"0", b"1", b"1e308", b"NaN", b"-Infinity", b"null", b'"x"', b"", b"[]", b"{}", b"9" * 19, b"9" * 400]
_TEXTS += [b"%d" % (1 << shift) for shift in (7, 8, 15, 16, 31, 32, 40, 62, 63, 64)]
_INTEGERS = [0, 1, -1, 127, 255, 32767, 65535, (1 << 31) - 1, -(1 << 31), (1 << 40), (1 << 62), (1 << 63) - 1]


def damaged(content: bytes, dice: random.Random) -> bytes:
    """One to three random changes."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        content = dice.choice(_CHANGES)(content, dice)
    return content


def _place(content: bytes, dice: random.Random) -> int:
    # Headers decide more than numbers do, so the first bytes are hit as often as all others.
    end = len(content) if dice.random() < 0.5 else min(len(content), 400)
    return dice.randrange(end) if end else 0


def _block(content: bytes, dice: random.Random) -> bytes:
    start = _place(content, dice)
    return content[start : start + dice.choice((1, 2, 8, 64, 1000, len(content)))]


def _flip(content: bytes, dice: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 8)) if content else 0):
        changed[_place(content, dice)] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _integer(content: bytes, dice: random.Random) -> bytes:
    size = dice.choice((1, 2, 4, 8))
    value = (dice.choice(_INTEGERS) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    start = _place(content, dice)
    return content[:start] + value + content[start + size :]


def _number(content: bytes, dice: random.Random) -> bytes:
    found = [match.span() for match in _NUMBERS.finditer(content[:20_000])]
    if not found:
        return _flip(content, dice)
    start, end = dice.choice(found)
    return content[:start] + dice.choice(_TEXTS) + content[end:]


def _truncate(content: bytes, dice: random.Random) -> bytes:
    return content[: _place(content, dice)]


def _insert(content: bytes, dice: random.Random) -> bytes:
    start = _place(content, dice)
    new = dice.randbytes(dice.choice((1, 4, 100))) if dice.random() < 0.5 else _block(content, dice)
    return content[:start] + new + content[start:]


def _delete(content: bytes, dice: random.Random) -> bytes:
    start = _place(content, dice)
    return content[:start] + content[start + dice.choice((1, 2, 8, 100)) :]


def _splice(content: bytes, dice: random.Random) -> bytes:
    block, start = _block(content, dice), _place(content, dice)
    return content[:start] + block + content[start + len(block) :]


_CHANGES = (_flip, _integer, _integer, _number, _number, _truncate, _insert, _delete, _splice)


def damaged_within(name: str, content: bytes, dice: random.Random) -> bytes:
    """Damage behind the checksums of an archive, or in the header of a safetensors file."""
    if content.startswith(b"PK\x03\x04"):
        return _damaged_archive(content, dice)
    if content.startswith(b"\x1f\x8b"):
        return gzip.compress(damaged(gzip.decompress(content), dice), mtime=0)
    if name.endswith(".safetensors") and len(content) > 8:
        length = int.from_bytes(content[:8], "little")
        header = damaged(content[8 : 8 + length], dice)
        return len(header).to_bytes(8, "little") + header + content[8 + length :]
    return damaged(content, dice)


def _damaged_archive(content: bytes, dice: random.Random) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        infos = old.infolist()
        chosen = dice.choice(infos)
        for info in infos:
            data = old.read(info)
            new.writestr(info, damaged(data, dice) if info is chosen else data)
    return stream.getvalue()


def damaged_files(files: Files, dice: random.Random) -> Files:
    """One of the files damaged, with the checksums around it made right half of the time."""
    name = dice.choice(sorted(files))
    within = dice.random() < 0.5
    changed = {**files, name: (damaged_within(name, files[name], dice) if within else damaged(files[name], dice))}
    return _with_checksums(changed) if within else changed


def _with_checksums(files: Files) -> Files:
    """A trace's manifest made to agree with its own content and with its files."""
    place = next((name for name in files if name.endswith("manifest.json")), None)
    if place is None:
        return files
    try:
        manifest = json.loads(files[place])
        manifest.pop("sha256", None)
        for shard in manifest["shards"]:
            content = files[place.replace("manifest.json", shard["file"])]
            length = min(int.from_bytes(content[:8], "little"), len(content))
            shard.update(bytes=len(content), sha256=hashlib.sha256(content[: 8 + length]).hexdigest())
        routers = files[place.replace("manifest.json", "routers.safetensors")]
        manifest["routers_sha256"] = hashlib.sha256(routers).hexdigest()
        manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        return {**files, place: json.dumps(manifest).encode()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return files  # damaged beyond that


# --- the run ---------------------------------------------------------------------------------------------


def samples(names: list[str], folder: Path) -> dict[str, tuple[str, Files]]:
    """Each target's sample: the path to read, below some folder, and all files by their paths below it."""
    found = {}
    for name in names:
        place = folder / name
        place.mkdir(parents=True)
        path = TARGETS[name].build(place)
        files = {file.relative_to(place).as_posix(): file.read_bytes() for file in place.rglob("*") if file.is_file()}
        found[name] = path.relative_to(place).as_posix(), files
    return found


def run(names: list[str], mutations: int, seed: str) -> Iterator[dict[str, object]]:
    """Read ``mutations`` damaged files per target; yields what is about to be read, and failures."""
    with tempfile.TemporaryDirectory() as work:
        base = Path(work)
        everything = samples(names, base / "samples")
        for name in names:
            path, files = everything[name]
            scratch = base / "scratch"
            for number in range(mutations + 1):
                dice = random.Random(f"{seed} {name} {number}")
                shutil.rmtree(scratch, ignore_errors=True)
                for file, content in (damaged_files(files, dice) if number else files).items():
                    (scratch / "in" / file).parent.mkdir(parents=True, exist_ok=True)
                    (scratch / "in" / file).write_bytes(content)
                yield {"about": f"{name} {number}"}
                started = time.monotonic()
                problem = _problem(TARGETS[name], scratch / "in" / path, scratch, whole=number == 0)
                if problem is None and time.monotonic() - started > SLOW_SECONDS:
                    problem = f"took {time.monotonic() - started:.0f} s"
                if problem is not None:
                    yield {"target": name, "number": number, "seed": seed, "problem": problem}


def _problem(target: Target, path: Path, scratch: Path, *, whole: bool) -> str | None:
    """What is wrong with how a file was read; None if nothing is."""
    try:
        with warnings.catch_warnings(record=True) as noise:
            warnings.simplefilter("always")
            target.read(path, scratch)
        return f"warns: {noise[0].message}" if noise else None
    except SpecmoeError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) or "allocate" in str(cause):
                return f"asked for too much memory: {cause!r}"
            cause = cause.__cause__
        if "\n" in str(error):
            return f"message of several lines: {error!r}"
        return f"the undamaged sample is refused: {error}" if whole else None
    except BaseException as error:
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} at {Path(last.filename).name}:{last.lineno}"


def limit_memory() -> None:
    """Let the process grow by no more than :data:`MEMORY_BYTES`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """``fuzz.py MUTATIONS SEED [TARGET …]``."""
    mutations, seed, names = int(sys.argv[1]), sys.argv[2], sys.argv[3:] or list(TARGETS)
    torch.set_num_threads(1)
    for _ in run(names, 0, seed):  # libraries are loaded and warm before memory is limited
        pass
    limit_memory()
    for line in run(names, mutations, seed):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
