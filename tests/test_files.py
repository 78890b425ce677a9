"""Files are written whole or not at all, and a checkpoint gives back exactly what went in."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from specmoe.checkpoint import load_checkpoint, save_checkpoint
from specmoe.errors import SpecmoeError
from specmoe.files import atomic_path, may_replace, read_json, remove_leftovers, sha256_file, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_then_raise(path: Path, error: BaseException) -> None:
    before = path.read_text()
    with atomic_path(path) as temporary:
        temporary.write_text("half of the new")
        assert path.read_text() == before
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(1)], ids=lambda e: type(e).__name__
)
def test_an_interrupted_write_leaves_the_old_content_and_no_litter(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "value.txt"
    write_text(path, "old")
    with pytest.raises(type(error)):
        write_then_raise(path, error)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["value.txt"]


def test_nothing_appears_under_the_final_name_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "below" / "value.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert names(path.parent) == ["value.txt"]


def test_what_a_killed_process_left_does_not_get_into_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "value.txt"
    (tmp_path / f".value.txt.{os.getpid()}.tmp").write_text("a long leftover of another life")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == [f".value.txt.{os.getpid()}.tmp", "value.txt"]


def test_temporary_files_are_new_ones_that_nobody_can_foresee(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, victim = tmp_path / "value.txt", tmp_path / "victim"
    victim.write_text("precious")
    seen = []
    for _ in range(3):
        with atomic_path(path) as temporary:
            seen.append(temporary.name)
            temporary.write_text("new")
    assert len(set(seen)) == 3
    assert not any(str(os.getpid()) in name.removesuffix(".tmp").split(".") for name in seen)
    # Somebody who could foresee it all the same is refused, not followed.
    monkeypatch.setattr("specmoe.files.secrets.token_hex", lambda count: "ab" * count)
    planted = tmp_path / f".value.txt.{'ab' * 8}.tmp"
    for target in (victim, tmp_path / "dangling"):
        planted.symlink_to(target)
        with pytest.raises(SpecmoeError, match=os.strerror(errno.EEXIST)):
            write_text(path, "newer")
        planted.unlink(missing_ok=True)
    assert victim.read_text() == "precious"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["value.txt", "victim"]


def test_a_link_in_the_files_place_is_replaced_and_one_in_the_temporarys_not_followed(tmp_path: Path) -> None:
    path, victim = tmp_path / "value.txt", tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o640)
    path.symlink_to(victim)
    write_text(path, "new")
    assert not path.is_symlink()
    assert (path.read_text(), victim.read_text()) == ("new", "precious")
    with pytest.raises(SpecmoeError, match="cannot write"), atomic_path(path) as temporary:
        temporary.unlink()
        temporary.symlink_to(victim)
    assert (path.read_text(), victim.stat().st_mode & 0o777) == ("new", 0o640)
    assert names(tmp_path) == ["value.txt", "victim"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "\N{EURO SIGN}" * 85):
        write_text(tmp_path / name, "new")
        assert names(tmp_path) == [name]
        (tmp_path / name).unlink()


def test_a_folder_that_cannot_be_synced_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr("specmoe.files.os.fsync", refuse)
    write_text(tmp_path / "value.txt", "new")
    assert (tmp_path / "value.txt").read_text() == "new"


def test_what_may_be_replaced(tmp_path: Path) -> None:
    ours, other, link = tmp_path / "ours", tmp_path / "other", tmp_path / "link"
    ours.write_text("ours")
    other.write_text("other")
    link.symlink_to(other)
    os.mkfifo(tmp_path / "pipe")

    def check(path: Path, force: bool = False, read: tuple[Path, ...] = ()) -> None:
        may_replace(path, is_ours=lambda path: path.read_text() == "ours", force=force, read=read)

    check(tmp_path / "new")
    check(tmp_path / "new", read=(other,))
    check(ours)
    check(other, force=True)
    for path in (other, link):
        with pytest.raises(SpecmoeError, match="replace it with --force"):
            check(path)
    for force in (False, True):
        for path, read in ((ours, ours), (link, other), (other, link)):
            with pytest.raises(SpecmoeError, match="over what it is made from"):
                check(path, force, (tmp_path / "missing", read))
        with pytest.raises(SpecmoeError, match="is a folder"):
            check(tmp_path, force)
        with pytest.raises(SpecmoeError, match="no regular file"):
            check(tmp_path / "pipe", force)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nothing")
    with pytest.raises(SpecmoeError, match="--force"):
        check(dangling)


def test_the_new_file_is_readable_as_the_umask_says(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    old = os.umask(0o022)
    try:
        save_checkpoint(path, {"x": torch.zeros(3)})
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EROFS, "permission denied"),
        (errno.EFBIG, "limit on file size"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_a_failing_disk_is_named(tmp_path: Path, number: int, words: str) -> None:
    path = tmp_path / "value.txt"
    write_text(path, "old")
    with pytest.raises(SpecmoeError, match=words) as caught:
        write_then_raise(path, OSError(number, os.strerror(number)))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["value.txt"]


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a mistake in the code"), atomic_path(tmp_path / "x"):
        raise ValueError("a mistake in the code")


def test_a_file_in_place_of_a_folder_is_an_error_for_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecmoeError, match="cannot write"):
        write_text(tmp_path / "file" / "below.txt", "text")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(SpecmoeError, match="cannot write"):
        write_text(tmp_path / "folder", "text")
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, {"deep": [1.0, {"x": math.nan}]}])
def test_json_is_strict(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"old": True})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, value)
    assert read_json(path) == {"old": True}
    assert names(tmp_path) == ["value.json"]


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=12,
    )
)
def test_json_comes_back_as_it_went(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "roundtrip.json"
    write_json(path, value)
    assert read_json(path) == value


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"a": 1}}', b"\xff\xfe\x00", b"[" * 100_000],
    ids=["empty", "cut", "more", "binary", "deep"],
)
def test_what_is_no_json_is_an_error_for_the_user(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(SpecmoeError, match="cannot be read as JSON"):
        read_json(path)


def test_missing_json_and_folders(tmp_path: Path) -> None:
    with pytest.raises(SpecmoeError, match="does not exist"):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(SpecmoeError, match="cannot be read"):
        read_json(tmp_path)


def test_sha256_of_a_known_text(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# Checkpoints


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().contiguous().view(torch.uint8)


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal in value and kind, tensors bit by bit; tuples may have become lists."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, torch.Tensor)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(bits_of(ours), bits_of(theirs))
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        assert [type(key) for key in ours] == [type(key) for key in theirs]
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs or (math.isnan(ours) and math.isnan(theirs))


def test_any_nesting_comes_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    state = {
        "numbers": [0, -(2**70), 1.5, 1e-300, math.inf, -math.inf, math.nan, True, None, "text \u2603 \x00"],
        "int keys": {0: {"a": torch.tensor(3.0)}, 7: {}},
        "text and number": {1: "one", "1": "another"},
        "tuple": (1, (2, (3,))),
        "empty": [[], {}, (), torch.zeros(0, 3), ""],
        "dtypes": [
            torch.tensor([1.0, math.nan, -0.0, math.inf], dtype=dtype)
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        ],
        "more dtypes": [torch.tensor([True, False]), torch.tensor([2**40]), torch.tensor([255], dtype=torch.uint8)],
        "shared": [shared, shared, shared.t(), shared[0], shared[:, 1]],
        "tensor": "a string that looks like a marker",
        "dict": {"tensor": "0", "list": [], "value": 1},
    }
    save_checkpoint(tmp_path / "state", state)
    again = load_checkpoint(tmp_path / "state")
    assert_same(again, state)
    assert isinstance(again["tuple"], list)


def test_a_loaded_checkpoint_does_not_depend_on_its_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, {"x": torch.ones(1000)})
    loaded = load_checkpoint(path)["x"]
    save_checkpoint(path, {"x": torch.zeros(1000)})
    path.write_bytes(b"")
    path.unlink()
    assert torch.equal(loaded, torch.ones(1000))
    loaded += 1


def make_parts(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    groups = [{"params": model[0].parameters(), "weight_decay": 0.1}, {"params": model[2].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    if kind == "cosine":
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=1e-4)
    return model, optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)


def advance(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, kind: str, first: int, last: int
) -> None:
    for step in range(first, last):
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
        if kind == "cosine":
            scheduler.step()
        else:
            scheduler.step([3.0, 2.0, 2.5, 2.6, 1.0, 1.5, 1.4, 1.3][step])


@pytest.mark.parametrize("kind", ["cosine", "plateau"])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimizer_continues_from_a_checkpoint_bit_by_bit(tmp_path: Path, kind: str, steps: int) -> None:
    model, optimizer, scheduler = make_parts(kind)
    advance(model, optimizer, scheduler, kind, 0, steps)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    if kind == "plateau" and steps == 0:
        assert math.inf in state["scheduler"].values()
    save_checkpoint(tmp_path / "state", state)
    loaded = load_checkpoint(tmp_path / "state")
    assert_same(loaded, state)
    advance(model, optimizer, scheduler, kind, steps, 8)

    other, other_optimizer, other_scheduler = make_parts(kind)
    other.load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    other_scheduler.load_state_dict(loaded["scheduler"])
    advance(other, other_optimizer, other_scheduler, kind, steps, 8)
    assert_same(other.state_dict(), model.state_dict())
    assert_same(other_optimizer.state_dict(), optimizer.state_dict())
    assert other_scheduler.state_dict() == scheduler.state_dict()


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), 1j], ids=lambda value: type(value).__name__)
def test_what_a_checkpoint_cannot_hold_is_refused_at_saving(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="cannot hold"):
        save_checkpoint(tmp_path / "state", {"x": [value]})
    assert names(tmp_path) == []


def test_a_key_that_would_not_come_back_is_refused_at_saving(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold"):
        save_checkpoint(tmp_path / "state", {("a", 1): 2})
    assert names(tmp_path) == []


def damaged_at_every_place(path: Path, whole: bytes) -> list[int]:
    """The bytes whose loss goes unnoticed: loading gives something, and it is not what was saved."""
    expected = load_checkpoint(path)
    unnoticed = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x04]) + whole[place + 1 :])
        try:
            loaded = load_checkpoint(path)
        except SpecmoeError:
            continue
        try:
            assert_same(loaded, expected)
        except (AssertionError, TypeError):
            unnoticed.append(place)
    return unnoticed


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, {"weights": torch.arange(8.0), "step": 12345, "best": 0.625, "names": ["a", "b"]})
    assert damaged_at_every_place(path, path.read_bytes()) == []


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1])
def test_a_cut_checkpoint_is_an_error_for_the_user(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "state"
    save_checkpoint(path, {"weights": torch.arange(8.0), "step": 12})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SpecmoeError, match="damaged") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def with_header(tensors: dict[str, torch.Tensor], tree: str | None, path: Path) -> None:
    save_file(tensors, str(path), metadata=None if tree is None else {"tree": tree})


@pytest.mark.parametrize(
    "tree",
    [
        None,
        "",
        "5",
        "[]",
        "null",
        '"text"',
        "{}",
        '{"tensor": "1"}',
        '{"dict": 5}',
        '{"dict": [[[], {"value": 1}]]}',
        '{"dict": [["key", 5]]}',
        '{"list": null}',
        '{"a": 1, "b": 2}',
        '{"list": ' * 3000 + "[]" + "}" * 3000,
        '{"list": [' * 3000 + "]}" * 3000,
    ],
)
def test_a_file_of_something_else_is_an_error_for_the_user(tmp_path: Path, tree: str | None) -> None:
    path = tmp_path / "state"
    with_header({"0": torch.zeros(2)}, tree, path)
    with pytest.raises(SpecmoeError, match="damaged"):
        load_checkpoint(path)


def test_other_files_are_errors_for_the_user(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for content in (
        b"not safetensors at all",
        json.dumps({"tree": {}}).encode(),
        struct.pack("<Q", 1 << 60),
        bytes(64),
    ):
        path.write_bytes(content)
        with pytest.raises(SpecmoeError, match="damaged"):
            load_checkpoint(path)
    with pytest.raises(SpecmoeError):
        load_checkpoint(tmp_path)


# What kills leave


WRITER = """
import sys, time
from pathlib import Path
from specmoe.files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    time.sleep(60)
"""


def writing(path: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_what_is_written_now_stays_and_what_was_killed_goes(tmp_path: Path) -> None:
    (killed, left), (alive, written) = writing(tmp_path / "a"), writing(tmp_path / "b")
    try:
        killed.kill()
        killed.communicate()
        assert names(tmp_path) == sorted([left, written])
        remove_leftovers(tmp_path)
        assert names(tmp_path) == [written]
    finally:
        alive.kill()
        alive.communicate()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_only_temporary_files_of_ours_are_removed(tmp_path: Path) -> None:
    token = "0123456789abcdef"
    stay = [
        ".tmp",
        ".tmpfile",
        "a.tmp",
        ".a.tmp",
        f".a.{token}",
        f".a.{token}0.tmp",
        ".a.xyz.tmp",
    ]
    go = [
        f".a.{token}.tmp",
        f".a.b c.{token}.tmp",
        ".7.77.tmp",
        f".a.{os.getpid()}.tmp",
        ".tmpAb12Cd",
    ]
    for name in (*stay, *go):
        (tmp_path / name).write_text("x")
    (tmp_path / f".folder.{token}.tmp").mkdir()
    (tmp_path / f".link.{token}.tmp").symlink_to(tmp_path / "a.tmp")
    os.mkfifo(tmp_path / f".pipe.{token}.tmp")
    remove_leftovers(tmp_path)
    others = [f".{kind}.{token}.tmp" for kind in ("folder", "link", "pipe")]
    assert names(tmp_path) == sorted([*stay, *others])
    remove_leftovers(tmp_path / "missing")


def test_of_one_file_only_what_was_to_become_it_is_removed(tmp_path: Path) -> None:
    token, long = "0123456789abcdef", "n" * 250
    for name in ("a", "a.b", long[:200]):
        (tmp_path / f".{name}.{token}.tmp").write_text("x")
    remove_leftovers(tmp_path, "a")
    assert names(tmp_path) == [f".a.b.{token}.tmp", f".{long[:200]}.{token}.tmp"]
    remove_leftovers(tmp_path, long)
    assert names(tmp_path) == [f".a.b.{token}.tmp"]


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / ".a.0123456789abcdef.tmp"
    left.write_text("x")
    monkeypatch.setattr("specmoe.files._fcntl", None)
    remove_leftovers(tmp_path)
    assert left.exists()
