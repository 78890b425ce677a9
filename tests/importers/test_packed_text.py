"""Every text format inside gzip, behind a byte order mark, as UTF-16: the same trace as from the plain file."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from text_samples import SAMPLES, jsonl, problems, refused, routing, run

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import _streams, import_trace, recognise
from specmoe.sources.importers._streams import first_bytes, open_text, scratch
from specmoe.sources.importers._text import blocks, refuse_cut
from specmoe.trace import Trace

NAMES = sorted(SAMPLES)
# How the same text may come: the ending of its name, and its bytes.
FORMS: dict[str, tuple[str, Callable[[str], bytes]]] = {
    "gzip": (".gz", lambda text: gzip.compress(text.encode())),
    "gzip under another name": ("", lambda text: gzip.compress(text.encode())),
    "two gzip members": (".gz", lambda text: gzip.compress(text[:99].encode()) + gzip.compress(text[99:].encode())),
    "UTF-8 with a mark": ("", lambda text: b"\xef\xbb\xbf" + text.encode()),
    "UTF-16 little": ("", lambda text: b"\xff\xfe" + text.encode("utf-16-le")),
    "UTF-16 big": ("", lambda text: b"\xfe\xff" + text.encode("utf-16-be")),
    "UTF-32": ("", lambda text: text.encode("utf-32")),
    "UTF-16 in gzip": (".gz", lambda text: gzip.compress(text.encode("utf-16"))),
    "a mark in gzip": (".gz", lambda text: gzip.compress(b"\xef\xbb\xbf" + text.encode())),
}


def same(one: Trace, other: Trace) -> None:
    assert len(one) == len(other) > 0
    assert one.topology == other.topology
    for number in range(len(one)):
        tensors = dict(other.read(number).tensors())
        assert all(torch.equal(tensors[key], value) for key, value in one.read(number).tensors())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_packed_text_is_recognised_and_gives_the_same_trace(tmp_path: Path, name: str, form: str) -> None:
    file, text = SAMPLES[name]
    (tmp_path / file).write_bytes(text().encode())
    ending, pack = FORMS[form]
    packed = tmp_path / "packed" / (file + ending)
    packed.parent.mkdir()
    packed.write_bytes(pack(text()))
    assert recognise(packed).name == name
    plain, _ = run(tmp_path / file, tmp_path / "plain")
    same(plain, run(packed, tmp_path / "one")[0])
    assert recognise(packed.parent).name == name
    same(plain, run(packed.parent, tmp_path / "folder")[0])


def mixed(documents: int = 3, tokens: int = 40) -> str:
    """Rows of several documents, one by one in turn, so that each is read in pieces from all over the file."""
    rows = [problems(routing(tokens, seed), problem=seed) for seed in range(documents)]
    return jsonl([row for turn in zip(*rows, strict=True) for row in turn])


def test_a_packed_file_is_unpacked_once_for_those_who_jump_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text(mixed())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(mixed().encode()))
    made: list[tempfile._TemporaryFileWrapper[bytes]] = []
    genuine = tempfile.TemporaryFile

    def counted(dir: Path) -> object:
        made.append(genuine(dir=dir))
        assert dir == tmp_path / "deep"
        return made[-1]

    (tmp_path / "deep").mkdir()
    monkeypatch.setattr(tempfile, "TemporaryFile", counted)
    packed, _ = run(tmp_path / "b.jsonl.gz", tmp_path / "deep" / "not yet" / "trace", format="problem-jsonl")
    assert len(made) == 1
    assert made[0].closed
    same(packed, run(tmp_path / "a.jsonl", tmp_path / "plain", format="problem-jsonl")[0])
    assert len(made) == 1


def test_temporary_files_end_with_the_import_also_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(mixed().encode()))
    made = []
    genuine = _streams.temporary_file
    monkeypatch.setattr(_streams, "temporary_file", lambda: made.append(genuine()) or made[-1])

    def stop(_done: int, _total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_trace(tmp_path / "b.jsonl.gz", tmp_path / "trace", format="problem-jsonl", on_progress=stop)
    assert [file.closed for file in made] == [True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.jsonl.gz", "trace"]


def test_a_disk_that_is_full_of_unpacked_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _: object, /) -> int:
            raise OSError(28, "No space left on device")

    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(mixed().encode()))
    monkeypatch.setattr(_streams, "temporary_file", Full)
    refused(
        tmp_path / "b.jsonl.gz", tmp_path / "trace", "needs a temporary file.*No space left", format="problem-jsonl"
    )


@pytest.mark.parametrize("name", NAMES)
def test_damaged_gzip_is_one_clear_line(tmp_path: Path, name: str) -> None:
    file, text = SAMPLES[name]
    whole = gzip.compress(text().encode() * (20 if name == "colibri-route-trace" else 1))
    path = tmp_path / f"{file}.gz"
    for damaged, words in (
        (whole[:-9], "cut short: its gzip data have no end"),
        (whole[: len(whole) // 2], "cut short: its gzip data have no end"),
        (whole[:-8] + bytes(8), "damaged: its gzip data cannot be unpacked"),
        (whole + b"more", "damaged: its gzip data cannot be unpacked"),
        (whole[:4], "cut short"),
    ):
        path.write_bytes(damaged)
        refused(path, tmp_path / "trace", words, format=name)


def test_a_damaged_gzip_is_still_recognised_by_what_stands_before_the_damage(tmp_path: Path) -> None:
    whole = gzip.compress(jsonl(problems(routing(4000))).encode())
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    assert recognise(path).name == "problem-jsonl"
    refused(path, tmp_path / "trace", "no end")
    path.write_bytes(whole[:40])
    with pytest.raises(SpecmoeError, match="cut short: its gzip data have no end"):
        recognise(path)


def test_broken_utf_16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\xfe" + '{"a": 1}\n'.encode("utf-16-le") + b"\x00\xd8\x20\x00")
    refused(path, tmp_path / "trace", "not: 'utf-16", format="problem-jsonl")
    path.write_bytes(jsonl(problems(routing(3))).encode("utf-16") + b"\x20")  # half a character
    refused(path, tmp_path / "trace", "not: 'utf-16.* truncated data", format="problem-jsonl")


def test_a_gzip_that_unfolds_to_far_more_than_text_does_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_streams, "_UNFOLDING_SLACK", 0)
    path = tmp_path / "a.jsonl.gz"
    for content in (b"\n" * (64 << 20), b" " * (64 << 20)):
        path.write_bytes(gzip.compress(content))
        refused(path, tmp_path / "trace", "unpacks to more than", format="problem-jsonl")


def test_offsets_are_those_of_the_plain_text(tmp_path: Path) -> None:
    text = "".join(f'{{"row": {number}, "what": "ä"}}\n' for number in range(1000))
    plain = text.encode()
    start, stop = plain.index(b'{"row": 500'), plain.index(b'{"row": 900')
    for form, (ending, pack) in FORMS.items():
        path = tmp_path / f"{form}.jsonl{ending}"
        path.write_bytes(pack(text))
        refuse_cut(path)
        with open_text(path) as stream:
            assert stream.read() == plain
        assert first_bytes(path, 50) == plain[:50]
        (whole,) = blocks(path)
        assert int(whole.offset_N[500]) == start
        assert whole.end == len(plain)
        for _ in range(2):
            # Without a place for temporary files what lies before is read and passed over.
            (part,) = blocks(path, start=start, stop=stop, line=501)
            assert json.loads(part.text[0])["row"] == 500
            assert int(part.offset_N[0]) == start
            assert (len(part), part.end) == (400, stop)
        with scratch(tmp_path):
            one, other = open_text(path, start), open_text(path, start)
            assert [stream.read(11) for stream in (one, other, one)] == [
                b'{"row": 500',
                b'{"row": 500',
                plain[start:][11:22],
            ]
            one.close()
            assert other.read() == plain[start:][11:]
            other.close()
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress(b"a,b\n1,2"))
    with pytest.raises(SpecmoeError, match="last line has no end"):
        refuse_cut(cut)


def test_a_file_that_is_empty_but_for_its_wrapping(tmp_path: Path) -> None:
    for form, content in {"gzip": gzip.compress(b""), "mark": b"\xef\xbb\xbf", "utf16": b"\xff\xfe"}.items():
        path = tmp_path / f"{form}.jsonl"
        path.write_bytes(content)
        with open_text(path) as stream:
            assert stream.read() == b""
        refused(path, tmp_path / "trace", "no routed expert", format="problem-jsonl")
