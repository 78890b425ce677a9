"""All text formats alike: told apart, refused when damaged, continued after a kill, spared by line noise."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from text_samples import SAMPLES

from specmoe.errors import SpecmoeError
from specmoe.sources.importers import IMPORTERS, import_trace, recognise
from specmoe.trace import Trace

NAMES = sorted(SAMPLES)


def write(folder: Path, name: str) -> Path:
    file, text = SAMPLES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(text().encode())
    return folder / file


@pytest.mark.parametrize("name", NAMES)
def test_each_format_is_recognised_by_its_own_importer_only(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "in", name)
    head = file.read_bytes()[: 64 << 10]
    for path, start in ((file, head), (tmp_path / "in", b"")):
        found = [other for other in IMPORTERS if IMPORTERS[other].recognises(path, start)]
        # The general importer comes last, and knows what several of the others know, too.
        assert found in ([name], [name, "rows"])
        assert recognise(path).name == name


@pytest.mark.parametrize("name", NAMES)
def test_other_text_is_nobodys(tmp_path: Path, name: str) -> None:
    for number, text in enumerate(("", "\n\n", "hello\nworld\n", "a,b\n1,2\n", '{"a": 1}\n', "[1]\n", "\x00\x01")):
        path = tmp_path / f"{number}.txt"
        path.write_text(text)
        assert not IMPORTERS[name].recognises(path, text.encode())
    assert not IMPORTERS[name].recognises(tmp_path / "absent", b"")


@pytest.mark.parametrize("name", NAMES)
def test_wrong_and_truncated_files_are_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"\n",
        b"garbage\n" * 3,
        whole + b"garbage\n",
        # A line cut in its middle.
        whole.rstrip(b"\r\n")[: -len(whole.rstrip(b"\r\n").split(b"\n")[-1]) // 2],
        bytes(random.Random(0).randrange(256) for _ in range(2000)),
    ):
        path.write_bytes(damaged)
        with pytest.raises(SpecmoeError) as caught:
            import_trace(path, tmp_path / "trace", format=name)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_an_import_that_was_killed_continues(tmp_path: Path, name: str) -> None:
    for number in range(4):
        file = write(tmp_path / "in" / str(number), name)
        # Documents that carry names of their own must differ in them.
        file.write_bytes(file.read_bytes().replace(b"humaneval", b"set-%d" % number))

    def stop(done: int, _total: int | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    expected = import_trace(tmp_path / "in", tmp_path / "whole", format=name)
    with pytest.raises(KeyboardInterrupt):
        import_trace(tmp_path / "in", tmp_path / "parts", format=name, on_progress=stop)
    with pytest.raises(SpecmoeError, match="not finished"):
        Trace.open(tmp_path / "parts")
    assert len(Trace.open(tmp_path / "parts", allow_incomplete=True)) == 2
    assert import_trace(tmp_path / "in", tmp_path / "parts", format=name) == expected
    whole, parts = Trace.open(tmp_path / "whole"), Trace.open(tmp_path / "parts")
    assert len(whole) >= 4
    assert [document.doc_id for document in parts.documents] == [document.doc_id for document in whole.documents]
    for number in range(len(whole)):
        tensors = dict(parts.read(number).tensors())
        assert all(torch.equal(tensors[key], value) for key, value in whole.read(number).tensors())


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_within_what_is_imported_continues_and_is_no_part_of_it(tmp_path: Path, name: str) -> None:
    source = tmp_path / "in"
    for number in range(4):
        file = write(source / str(number), name)
        file.write_bytes(file.read_bytes().replace(b"humaneval", b"set-%d" % number))

    def stop(done: int, _total: int | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    import_trace(source, tmp_path / "whole", format=name)
    out = source / "traces" / "out"
    with pytest.raises(KeyboardInterrupt):
        import_trace(source, out, format=name, on_progress=stop)
    # What looks like input, in the trace's folder.
    shutil.copytree(source / "0", out / "copied")
    import_trace(source, out, format=name)
    import_trace(source, out, format=name)
    whole, inside = Trace.open(tmp_path / "whole"), Trace.open(out)
    assert [document.doc_id for document in inside.documents] == [document.doc_id for document in whole.documents]
    assert inside.manifest.source == whole.manifest.source
    # What lies beside it is part of what is imported.
    (source / "traces" / "notes.md").write_text("more")
    with pytest.raises(SpecmoeError, match="holds another trace"):
        import_trace(source, out, format=name)
    with pytest.raises(SpecmoeError, match="is what is imported"):
        import_trace(source, source / "traces" / "..", format=name)


def test_what_lies_in_the_folder_that_is_written_to_is_imported_all_the_same(tmp_path: Path) -> None:
    write(tmp_path / "out" / "in", NAMES[0])
    import_trace(tmp_path / "out" / "in", tmp_path / "out", format=NAMES[0])
    assert len(Trace.open(tmp_path / "out")) > 0


@pytest.mark.parametrize("name", NAMES)
def test_progress_ends_at_the_number_of_documents(tmp_path: Path, name: str) -> None:
    calls: list[tuple[int, int | None]] = []
    import_trace(write(tmp_path, name), tmp_path / "trace", on_progress=lambda *call: calls.append(call))
    documents = len(Trace.open(tmp_path / "trace"))
    assert [done for done, _ in calls] == list(range(1, documents + 1))
    assert {total for _, total in calls} <= {documents, None}


@pytest.mark.parametrize("name", NAMES)
def test_damage_anywhere_gives_a_trace_or_one_clear_line(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for trial in range(60):
        broken = bytearray(whole)
        if trial % 3 == 0:
            del broken[rng.randrange(len(broken)) :]
        else:
            for _ in range(rng.choice((1, 3, 30))):
                broken[rng.randrange(len(broken))] = rng.choice((rng.randrange(256), *b'0123456789,:"[]{} \n-.e'))
        path.write_bytes(broken)
        try:
            import_trace(path, tmp_path / f"trace-{trial}", format=name)
        except SpecmoeError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 15
