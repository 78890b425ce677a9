"""Texts from the user's files: what a document is, and what is said of files that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specmoe.errors import SpecmoeError
from specmoe.sources.texts import read_texts


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
        (b'{"text": "fine"}\n{"text": ', "line 2 is not JSON"),
        (b"[1]", "no JSON object"),
        (b'{"words": "x"}', "has no text; put it under one of: text"),
        (b'{"text": 5}', "has no text"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
    ],
)
def test_wrong_lines_are_described(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(SpecmoeError, match=words):
        read_texts([str(path)])


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
