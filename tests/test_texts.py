"""Texts from the user's files: what a document is, and what is said of files that are none."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from specmoe.errors import SpecmoeError
from specmoe.sources.corpus import Document, text_hash
from specmoe.sources.texts import read_texts


def lines_of(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def texts(*paths: Path) -> list[str]:
    return [document.text for document in read_texts([str(path) for path in paths])]


def named(documents: list[Document]) -> dict[str, str]:
    return {document.doc_id: document.text for document in documents}


def test_lines_of_json_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"text": "one", "domain": "prose"}, {"prompt": "two"}, {"question": "three", "source": "quiz"}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    (tmp_path / "plain.txt").write_text("four")
    documents = read_texts([str(path), str(tmp_path / "plain.txt")])
    assert [document.text for document in documents] == ["one", "two", "three", "four"]
    assert [document.domain for document in documents[:3]] == ["prose", "prompts", "quiz"]
    assert documents[2].doc_id == "prompts.jsonl:3"


def test_one_name_twice_is_told_apart(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text('{"text": "words"}')
        paths.append(str(tmp_path / folder / "x.jsonl"))
    assert [document.doc_id for document in read_texts(paths)] == ["x.jsonl:1", "x.jsonl:1 (2)"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "is empty"),
        (b'{"text": "fine"}\n{"text": ', "line 2 is not JSON"),
        (b'\n[\n{"text": "cut"},\n', "line 2 is not JSON"),
        (b"[1]", "no JSON object"),
        (b"7", "no JSON object"),
        (b'{"text": "fine"}\n{"words": "x"}', r"rows.jsonl, line 2 has no text; put it under one of: text"),
        (b'{"text": 5}', "has no text"),
        (b'{"prompt": [1, 2]}', "has no text"),
        (b'{"text": "\xe9"}', "cannot be read as UTF-8"),
        (b"\xff\xfe\x00", "cannot be read as UTF-16"),
        (b'{"messages": [{"role": 1, "content": "x"}]}', r"rows.jsonl, line 1, message 1: its role is no text"),
        (b'{"messages": [{"role": "user", "content": 1}]}', "line 1, message 1: its content is neither text nor"),
        (b'{"text": ""}\n{"text": null}\n{"messages": []}', r"is empty.*: rows without text, left out: 3 \(first:"),
        (gzip.compress(b'{"text": "a long text"}', mtime=0)[:-9], "cannot be read as UTF-8"),
    ],
)
def test_wrong_lines_are_described(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(SpecmoeError, match=words) as caught:
        read_texts([str(path)])
    assert "\n" not in str(caught.value)


def test_what_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match="does not exist"):
        read_texts([str(tmp_path / "none.jsonl")])
    with pytest.raises(SpecmoeError, match="does not exist"):
        read_texts([str(tmp_path / "none.txt")])
    with pytest.raises(SpecmoeError, match="is no data set"):
        read_texts(["hub:a/b/c/d"])


def test_a_data_set_takes_its_package() -> None:
    try:
        import datasets  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(SpecmoeError, match=r"pip install 'specmoe\[datasets\]'"):
            read_texts(["hub:org/name@test[:5]#text"])


# --- folders -------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_what_its_files_are(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "code").mkdir(parents=True)
    (folder / "prompts.jsonl").write_text(lines_of({"prompt": "one"}, {"prompt": "two", "category": "quiz"}))
    (folder / "code" / "more.ndjson").write_text(lines_of({"text": "three"}))
    (folder / "list.json").write_text(json.dumps([{"text": "four"}, "five"]))
    (folder / "plain.md").write_text("# six")
    (folder / "code" / "seven.py").write_text("seven = 7")
    (folder / "train-00000-of-00002.csv").write_text("question,id\neight,1\n")
    documents = read_texts([str(folder)])
    assert named(documents) == {
        "set/prompts.jsonl:1": "one",
        "set/prompts.jsonl:2": "two",
        "set/code/more.ndjson:1": "three",
        "set/list.json:1": "four",
        "set/list.json:2": "five",
        "set/plain.md": "# six",
        "set/code/seven.py": "seven = 7",
        "set/train-00000-of-00002.csv:2": "eight",
    }
    domains = {document.text: document.domain for document in documents}
    assert domains == {
        "one": "prompts",
        "two": "quiz",
        "three": "code",
        "four": "list",
        "five": "list",
        "# six": "set",
        "seven = 7": "code",
        "eight": "train",
    }


def test_what_is_no_text_in_a_folder_is_passed_over_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (folder / "a.txt").write_text("a")
    (folder / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "zeros").write_bytes(b"text\0more")
    (folder / "package.json").write_text('{"name": "x", "keywords": ["a"]}')
    (folder / "list.json").write_text('[{"name": "x"}]')
    (folder / "comments.json").write_text("{ // no JSON\n}")
    (folder / "table.csv").write_text("x,y\n1,2\n")
    (folder / "blank.jsonl").write_text(lines_of({"text": "b"}, {"text": " "}, {"text": None}))
    (folder / "weights.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    notes: list[str] = []
    documents = read_texts([str(folder)], notes.append)
    assert {document.text for document in documents} == {"a", "b"}
    assert sorted(notes) == [
        f"files of JSON or tables without text, passed over: 4 (first: {folder / 'comments.json'})",
        f"files that are no text, passed over: 3 (first: {folder / 'image.png'})",
        f"rows without text, left out: 2 (first: {folder / 'blank.jsonl'}, line 2)",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("image.png", b"\x89PNG\r\n\x1a\n"),
        ("zeros.txt", b"text\0more"),
        ("late.txt", b"text " * 4000 + b"\xff"),
        ("package.json", b'{"name": "x"}'),
        ("list.json", b'[{"name": "x"}]'),
        ("number.json", b"7"),
        ("cut.json", b'[{"text": "x"}'),
        ("table.csv", b"x,y\n1,2\n"),
        ("table.parquet", b"PAR1"),
    ],
)
def test_what_is_named_must_be_text(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SpecmoeError) as caught:
        read_texts([str(path)])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lines_of_a_folder_that_are_none_are_an_error(tmp_path: Path) -> None:
    # Lines are meant as rows wherever they lie; a table or a configuration need not be.
    (tmp_path / "rows.jsonl").write_text(lines_of({"words": "x"}))
    with pytest.raises(SpecmoeError, match=r"rows.jsonl, line 1 has no text"):
        read_texts([str(tmp_path)])


@pytest.mark.parametrize("name", ["page.txt", "page.md", "rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_a_web_page_where_text_is_due(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("<!DOCTYPE html><html></html>")
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(SpecmoeError, match=rf"{name} is an HTML page, not the file"):
            read_texts([str(place)])


def test_a_web_page_may_be_text(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<!DOCTYPE html><html></html>")
    assert texts(tmp_path) == texts(tmp_path / "page.html") == ["<!DOCTYPE html><html></html>"]


def test_a_pointer_where_text_is_due(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for place in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(SpecmoeError, match=r"a.txt is a Git LFS pointer"):
            read_texts([str(place)])


# --- how text is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_encodings(tmp_path: Path, encoding: str, packed: bool) -> None:
    contents = {
        "rows.jsonl": json.dumps({"text": "ä ☃ 1"}, ensure_ascii=False) + "\r\n",
        "list.json": json.dumps([{"text": "ä ☃ 2"}], ensure_ascii=False),
        "table.csv": "text,domain\r\nä ☃ 3,d\r\n",
        "table.tsv": "text\tdomain\nä ☃ 4\td\n",
        "plain.txt": "ä ☃ 5\r\nand a second line",
    }
    for name, content in contents.items():
        raw = content.encode(encoding)
        (tmp_path / (name + ".gz" * packed)).write_bytes(gzip.compress(raw) if packed else raw)
    found = texts(*(tmp_path / (name + ".gz" * packed) for name in contents))
    assert found == ["ä ☃ 1", "ä ☃ 2", "ä ☃ 3", "ä ☃ 4", "ä ☃ 5\nand a second line"]
    assert sorted(texts(tmp_path)) == sorted(found)


@pytest.mark.parametrize("folder", ["/dev/fd", "/proc/self/fd"])
def test_a_pipe_that_a_shell_has_opened(folder: str) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"words of another program")
    os.close(writer)
    assert texts(Path(folder) / str(reader)) == ["words of another program"]
    os.close(reader)


def test_a_pipe_that_may_have_no_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SpecmoeError, match="is a pipe, not a regular file"):
        texts(tmp_path / "pipe")


def test_gzip_without_its_name(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_bytes(gzip.compress(b"text"))
    assert texts(tmp_path / "plain.txt") == ["text"]


def test_halves_of_a_character_can_be_stored(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a \\ud800 b", "domain": "\\udfff"}')
    (document,) = read_texts([str(tmp_path / "rows.jsonl")])
    assert (document.text, document.domain) == ("a ? b", "?")
    assert text_hash([document])


# --- rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a", "prompt": "b"}, "a"),
        ({"text": "", "prompt": "b"}, "b"),
        ({"text": None, "query": "c"}, "c"),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2"),
        ({"instruction": "Sing.", "input": ""}, "Sing."),
        ({"input": "d"}, "d"),
        ({"content": "e"}, "e"),
        ("f", "f"),
    ],
)
def test_where_the_text_of_a_row_is(tmp_path: Path, row: Any, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(lines_of(row))
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert texts(tmp_path / "rows.jsonl", tmp_path / "rows.json") == [text, text]


@pytest.mark.parametrize(
    ("fields", "domain"),
    [
        ({"category": ["code", "python"]}, "code"),
        ({"category": [], "domain": ""}, "rows"),
        ({"category": [["deep"]]}, "deep"),
        ({"domain": float("nan"), "source": "s"}, "s"),
        ({"dataset": 7}, "7"),
        ({"source": 1.5, "category": "x"}, "1.5"),
        ({"domain": True, "source": {"a": 1}, "category": "x"}, "x"),
        ({"domain": "d", "category": "x"}, "d"),
    ],
)
def test_the_domain_of_a_row(tmp_path: Path, fields: dict[str, Any], domain: str) -> None:
    (tmp_path / "rows.jsonl").write_text(lines_of({"text": "words", **fields}))
    (document,) = read_texts([str(tmp_path / "rows.jsonl")])
    assert document.domain == domain


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"data": [{"text": "a"}, {"text": "b"}]}, {"x.json:1": "a", "x.json:2": "b"}),
        ({"version": 1, "prompts": ["a", "b"]}, {"x.json:1": "a", "x.json:2": "b"}),
        ({"rows": [{"prompt": "a"}]}, {"x.json:1": "a"}),
        ({"question": ["a", "b"]}, {"x.json:1": "a", "x.json:2": "b"}),
        ({"text": "a", "data": [1]}, {"x.json": "a"}),
        ("a", {"x.json": "a"}),
    ],
)
def test_forms_of_json(tmp_path: Path, content: Any, expected: dict[str, str]) -> None:
    for indent in (None, 2):
        (tmp_path / "x.json").write_text(json.dumps(content, indent=indent))
        assert named(read_texts([str(tmp_path / "x.json")])) == expected


def test_json_and_json_lines_under_each_others_names(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028line"}, {"text": "b"}]
    (tmp_path / "lines.json").write_text(lines_of(*rows))
    (tmp_path / "list.jsonl").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    assert texts(tmp_path / "lines.json") == texts(tmp_path / "list.jsonl") == ["a\u2028line", "b"]
    (tmp_path / "lines.json").write_text(lines_of(rows[0]) + "{")
    with pytest.raises(SpecmoeError, match=r"lines.json, line 2 is not JSON"):
        read_texts([str(tmp_path / "lines.json")])


def test_errors_of_a_list_name_its_entry(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"text": "a"}, {"words": "b"}]}))
    for place in (tmp_path, tmp_path / "x.json"):
        with pytest.raises(SpecmoeError, match=r"x.json, data 2 has no text"):
            read_texts([str(place)])


def test_tables(tmp_path: Path) -> None:
    with (tmp_path / "x.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerows([["id", "prompt", "category"], ["1", 'two\nlines, "quoted"', "quiz"], ["2", "b" * 200_000, ""]])
    documents = read_texts([str(tmp_path / "x.csv")])
    assert [document.text for document in documents] == ['two\nlines, "quoted"', "b" * 200_000]
    assert [document.domain for document in documents] == ["quiz", "x"]
    assert csv.field_size_limit() < 200_000


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": [{"role": "user", "content": "hello"}], "id": 3, "picture": b"\xff"},
        {"messages": [{"role": "user", "content": "again"}], "id": 3, "picture": b""},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    documents = read_texts([str(tmp_path / "x.parquet")])
    assert [json.loads(document.text)["messages"][0]["content"] for document in documents] == ["hello", "again"]
    assert all(document.is_chat and document.group == "x.parquet:3" for document in documents)


def test_parquet_takes_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(SpecmoeError, match=r"pip install 'specmoe\[parquet\]'"):
        read_texts([str(tmp_path)])


def test_rows_of_one_conversation_are_a_group(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "conversation_id": 5},
        {"text": "b", "conversation_id": "alone"},
        {"text": "c", "conversation_id": 5},
        {"text": "d", "session_id": "s"},
        {"text": "e", "id": "s"},
        {"text": "f", "id": "row-6"},
        {"text": "g"},
    ]
    (tmp_path / "x.jsonl").write_text(lines_of(*rows))
    groups = {document.text: document.group for document in read_texts([str(tmp_path / "x.jsonl")])}
    assert groups == {"a": "x.jsonl:5", "b": "", "c": "x.jsonl:5", "d": "x.jsonl:s", "e": "x.jsonl:s", "f": "", "g": ""}
