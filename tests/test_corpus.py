"""The standard library as text: split by name, without tests, and told apart by a hash."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from specmoe.errors import SpecmoeError
from specmoe.sources.corpus import Document, standard_library, text_hash
from specmoe.sources.texts import read_texts


@pytest.fixture(scope="module")
def library() -> dict[str, list[Document]]:
    return {"train": standard_library("train"), "held-out": standard_library("held-out")}


def test_no_file_is_in_both_parts(library: dict[str, list[Document]]) -> None:
    names = {part: [document.doc_id for document in documents] for part, documents in library.items()}
    for part in names.values():
        assert len(set(part)) == len(part)
    assert not set(names["train"]) & set(names["held-out"])


def test_a_fifth_of_the_files_is_held_out(library: dict[str, list[Document]]) -> None:
    everything = len(library["train"]) + len(library["held-out"])
    assert everything > 300
    assert 0.15 < len(library["held-out"]) / everything < 0.25


def test_every_file_worth_reading_is_in_one_part(library: dict[str, list[Document]]) -> None:
    names = {document.doc_id for documents in library.values() for document in documents}
    root = Path(sysconfig.get_path("stdlib"))
    for known in (
        "argparse.py",
        "json/decoder.py",
        "asyncio/tasks.py",
        "xml/dom/minidom.py",
        "importlib/_bootstrap.py",
    ):
        assert (root / known).stat().st_size > 1200
        assert known in names


def test_tests_generated_files_and_other_peoples_packages_are_in_neither(library: dict[str, list[Document]]) -> None:
    for documents in library.values():
        for document in documents:
            folders = document.doc_id.split("/")[:-1]
            assert not {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings"} & set(folders)
            assert len(document.text) >= 1200
            assert document.doc_id.endswith(".py")
            assert document.domain == (folders[0] if folders else "(top level)")


def test_the_parts_depend_on_names_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "library"
    names = [f"module{i}.py" for i in range(300)] + [f"package/file{i}.py" for i in range(300)]
    skipped = ["package/tests/a.py", "test/a.py", "site-packages/a.py", "encodings/a.py", "lib/dist-packages/b/a.py"]
    for name in [*names, *skipped]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n" + "x = 1\n" * 300)
    (root / "short.py").write_text("x = 1")
    (root / "text.txt").write_text("x = 1\n" * 300)
    (root / "latin.py").write_bytes(b"# \xe9\n" + b"x = 1\n" * 300)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    parts = {part: [d.doc_id for d in standard_library(part)] for part in ("train", "held-out")}
    assert sorted(parts["train"] + parts["held-out"]) == sorted(names)
    assert 0.14 < len(parts["held-out"]) / len(names) < 0.26
    for name in names[::2]:
        (root / name).unlink()
    for name in names[1::2]:
        (root / name).write_text("another text\n" * 200)
    fewer = {part: [d.doc_id for d in standard_library(part)] for part in ("train", "held-out")}
    assert fewer == {part: [name for name in own if name in set(names[1::2])] for part, own in parts.items()}


def test_a_python_without_sources_is_an_error_for_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SpecmoeError, match="no Python sources"):
        standard_library("train")


def test_files_and_folders_as_documents(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner" / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "a.txt").write_text("ä ☃", encoding="utf-8")
    (folder / "inner" / "c.py").write_text("c")
    (folder / "inner" / "deep" / "d").write_text("d")
    (folder / "empty").write_text("")
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "single.md").write_text("single")
    documents = read_texts([str(folder), str(tmp_path / "single.md")])
    names = [document.doc_id for document in documents]
    for name, end in zip(names, ["a.txt", "b.txt", "inner/c.py", "inner/deep/d", "single.md"], strict=True):
        assert f"/{name}".endswith(f"/{end}")
    assert [document.text for document in documents] == ["ä ☃", "b", "c", "d", "single"]
    assert [document.domain for document in documents[2:4]] == ["inner", "inner"]


def test_a_folder_names_the_domain_of_its_files(tmp_path: Path) -> None:
    for name in ("prose", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    documents = read_texts([str(tmp_path / "prose"), str(tmp_path / "code")])
    assert [document.domain for document in documents] == ["prose", "code"]


def test_files_of_the_same_name_in_two_folders_have_names_of_their_own(tmp_path: Path) -> None:
    # A trace holds a name once.
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"the text of {name}")
    documents = read_texts([str(tmp_path / "one"), str(tmp_path / "two")])
    assert {document.text for document in documents} == {"the text of one", "the text of two"}
    assert len({document.doc_id for document in documents}) == 2


def test_texts_that_cannot_be_read_are_errors_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match="does not exist"):
        read_texts([str(tmp_path / "nothing")])
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_bytes(b"")
    for paths in ([tmp_path], [tmp_path / "binary"], [tmp_path / "empty"], []):
        with pytest.raises(SpecmoeError, match="no readable"):
            read_texts([str(path) for path in paths])


def test_the_hash_changes_with_every_name_text_and_order() -> None:
    documents = [Document("a", "d", "one"), Document("b", "d", "two")]
    others = [
        documents,
        documents[::-1],
        documents[:1],
        [],
        [Document("a", "d", "one"), Document("b", "d", "two ")],
        [Document("a", "d", "one"), Document("c", "d", "two")],
        [Document("a", "d", "oneb"), Document("", "d", "two")],
        [Document("ab", "d", "one"), Document("", "d", "two")],
    ]
    assert len({text_hash(other) for other in others}) == len(others)
    assert text_hash(documents) == text_hash(iter(documents))
