"""Files are whole or not there, and what cannot be read or written is one line."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
from pathlib import Path

import pytest
from fuzz import fuzz
from hypothesis import example, given
from hypothesis import strategies as st

from hovit.utils.errors import HovitError
from hovit.utils.files import alone, atomic, digest, file_digest, read_json, write_json, write_text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False,
    allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.text(st.characters(codec="utf-8")), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def test_an_exception_inside_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write_half() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half of the n")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_appears_only_at_the_end(tmp_path):
    path = tmp_path / "deeper" / "a.txt"
    with atomic(path) as temporary:
        assert temporary.parent == path.parent  # the same file system, or it would be a copy
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_body_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(HovitError, match="cannot be written"), atomic(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_leftovers_go_by_their_locks_and_not_by_process_ids(tmp_path):
    path = tmp_path / "a.txt"
    dead = tmp_path / f".a.txt.{os.getpid()}.tmp"
    dead.write_text("half")
    with atomic(path) as first:
        assert not dead.exists()
        with atomic(path) as second:  # as from another container: the first stays
            second.write_text("second")
        assert first.exists()
        first.write_text("first")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_the_lock_of_a_folder_leaves_nothing_and_survives_a_killed_holder(tmp_path):
    folder = tmp_path / "pack"
    (tmp_path / ".pack.lock").touch()  # of a killed process
    with alone(folder) as locked:
        assert locked
        with pytest.raises(HovitError, match="in use by another process"), alone(folder):
            pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_third_process_stays(tmp_path, monkeypatch):
    """A waiting process gets the file of the first holder, which has removed it meanwhile."""
    lock = tmp_path / ".pack.lock"
    theirs = []

    def replaced(handle: int, path: Path) -> bool:
        path.unlink()  # by the first holder; then a third process makes and locks a new one
        theirs.append(os.open(path, os.O_RDWR | os.O_CREAT))
        fcntl.flock(theirs[0], fcntl.LOCK_EX)
        return False

    monkeypatch.setattr("hovit.utils.files._is_same", replaced)
    with pytest.raises(HovitError, match="in use by another process"), alone(tmp_path / "pack"):
        pass
    assert lock.exists()
    assert os.path.samestat(os.fstat(theirs[0]), lock.stat())
    os.close(theirs[0])


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    leftover = tmp_path / ".a.txt.1.tmp"
    leftover.touch()
    with alone(tmp_path / "pack") as locked:
        assert not locked
        write_text(tmp_path / "a.txt", "text")
    assert leftover.exists()  # nobody can tell whether its writer is alive
    assert (tmp_path / "a.txt").read_text() == "text"


@pytest.mark.parametrize("inside", ["a.txt", "deeper/a.txt"])
def test_a_path_under_a_file_cannot_be_written(tmp_path, inside):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(HovitError, match=r"a\.txt: cannot be written") as caught:
        write_text(tmp_path / "file" / inside, "text")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_cannot_be_written(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o500)
    with pytest.raises(HovitError, match="cannot be written: Permission denied"):
        write_text(folder / "a.txt", "text")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("step", ["mkdir", "write_text"])
def test_whatever_the_system_refuses_is_one_line(tmp_path, monkeypatch, code, step):
    write_text(tmp_path / "a.txt", "old")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, refuse)
        with pytest.raises(HovitError) as caught:
            write_text(tmp_path / "a.txt", "new")
    assert str(caught.value) == f"{tmp_path / 'a.txt'}: cannot be written: {os.strerror(code)}"
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(HovitError, match="cannot be written"):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_without_nan_and_infinity(tmp_path, value):
    path = tmp_path / "a.json"
    write_json(path, {"was": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"top1": [1.0, value]})
    assert read_json(path) == {"was": 1}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(value)


@fuzz(100)
@given(value=st.dictionaries(st.text(), JSON))
def test_json_comes_back_as_it_was(tmp_path, value):
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    "data", [b"", b"{", b"{'a': 1}", b"\xff\xfe\x00", b"[1,]", b"[1] [2]", b"[1]", b"3"]
)
def test_garbage_is_not_json(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(HovitError, match=r"a\.json: not readable as JSON") as caught:
        read_json(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", ["[" * 200_000, "1" * 5_000], ids=["deep", "long number"])
def test_json_that_python_will_not_read_is_one_line(tmp_path, data):
    (tmp_path / "a.json").write_text(data)
    with pytest.raises(HovitError, match=r"a\.json: not readable as JSON"):
        read_json(tmp_path / "a.json")


@fuzz(100)
@given(data=st.binary(max_size=60) | st.text('[]{}",:0123456789eE+-.\\utrfalsn ').map(str.encode))
@example(data=b'"\\ud800"')
@example(data=b"NaN")
def test_bytes_give_an_object_or_one_line(tmp_path, data):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with contextlib.suppress(HovitError):  # anything else fails
        assert isinstance(read_json(path), dict)


def test_what_is_no_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path / "gone.json", tmp_path, tmp_path / "file" / "a.json"):
        for read in (read_json, file_digest):
            with pytest.raises(HovitError, match=str(path)):
                read(path)


def test_digest_is_of_the_value_not_of_its_writing():
    assert digest({"a": 1, "b": [1, {"c": 2, "d": 3}]}) == digest(
        {"b": [1, {"d": 3, "c": 2}], "a": 1}
    )
    assert digest({}) == hashlib.sha256(b"{}").hexdigest()
    different = [[1, 2], [2, 1], {"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": None}, {"b": 1}, "a"]
    assert len({digest(value) for value in different}) == len(different)


@given(value=st.dictionaries(st.text(st.characters(codec="utf-8")), JSON, min_size=2))
def test_digest_does_not_see_key_order_or_a_trip_through_json(value):
    backwards = dict(reversed(value.items()))
    assert digest(backwards) == digest(value) == digest(json.loads(json.dumps(value)))


def test_file_digest(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
