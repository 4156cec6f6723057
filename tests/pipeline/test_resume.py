"""A file in parts: no stranger's file is touched, nothing damaged is believed, two writers never share one."""

import errno
import json
import os

import pytest

from qjax.errors import UserError
from qjax.pipeline import resume
from qjax.pipeline.resume import resumable_file

BODY = b"a part of sixteen"


def write(out, key="key", parts=("one", "two"), stop=None, notify=lambda line: None):
    """A file of two parts; `stop` ends the writer as a kill would, behind that part. Returns the parts written."""
    made = []
    with resumable_file(out, key, 2 * len(BODY), notify) as partial:
        for n, name in enumerate(parts):
            if name not in partial.finished:
                partial.write(name, n * len(BODY), BODY, {"error": 0.1 + n})
                made.append(name)
            assert partial.finished[name] == {"error": 0.1 + n}
            if name == stop:
                raise KeyboardInterrupt
    assert out.read_bytes() == 2 * BODY
    return made


@pytest.fixture
def out(tmp_path):
    return tmp_path / "o"


@pytest.fixture
def stopped(out):
    with pytest.raises(KeyboardInterrupt):
        write(out, stop="one")
    return out.with_name("o.partial"), out.with_name("o.partial.journal")


def test_a_stopped_writer_is_continued(out, stopped, tmp_path):
    assert write(out) == ["two"] and os.listdir(tmp_path) == ["o"]


@pytest.mark.parametrize("name", ["o.partial", "o.partial.journal"])
@pytest.mark.parametrize("kind", ["a file", "a link", "a second name", "a folder", "another user's"])
def test_a_foreign_file_is_refused_and_left(out, tmp_path, name, kind, monkeypatch):
    mine = tmp_path / "thesis.tex"
    mine.write_text("years of work")
    if kind == "a file":
        (tmp_path / name).write_text("years of work")
    elif kind == "a link":
        (tmp_path / name).symlink_to(mine)
    elif kind == "a second name":
        os.link(mine, tmp_path / name)
    elif kind == "a folder":
        (tmp_path / name).mkdir()
    else:
        out.with_name("o.partial").touch(), out.with_name("o.partial.journal").touch()
        euid = os.geteuid()
        monkeypatch.setattr(resume.os, "geteuid", lambda: euid + 1)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=r"/o\.partial(\.journal)?: .*move or delete it"):
        write(out)
    assert sorted(os.listdir(tmp_path)) == before and mine.read_text() == "years of work"
    if kind == "a file":
        assert (tmp_path / name).read_text() == "years of work"


def damage(journal, how):
    lines = journal.read_bytes().splitlines(keepends=True)
    line = json.loads(lines[1])
    if how == "bytes":
        return b"\0" * 60
    if how == "the key":
        return lines[0].replace(b'"', b"'") + lines[1]
    if how == "deep":
        return lines[0] + b"[" * 100_000 + b"\n"
    if how == "another note":
        return lines[0] + json.dumps(line | {"note": {"error": 7}}).encode() + b"\n"
    if how == "another place":
        return lines[0] + json.dumps(line | {"offset": 3}).encode() + b"\n"
    if how == "a list for a name":
        return lines[0] + json.dumps(line | {"part": ["one"]}).encode() + b"\n"
    if how == "half numbers":
        return lines[0] + json.dumps(line | {"offset": 0.5, "nbytes": True}).encode() + b"\n"
    return lines[0] + lines[1][:-9]  # torn


@pytest.mark.parametrize(
    "how", ["torn", "deep", "another note", "another place", "a list for a name", "half numbers", "the key", "bytes"]
)
def test_a_damaged_journal_is_not_believed(out, stopped, tmp_path, how):
    partial, journal = stopped
    journal.write_bytes(damage(journal, how))
    if how in ("bytes", "the key"):  # whose file it is cannot be told any more
        for _ in range(2):
            with pytest.raises(UserError, match=r"o\.partial(\.journal)?: .*move or delete it"):
                write(out)
        assert partial.read_bytes()[: len(BODY)] == BODY
        partial.unlink(), journal.unlink()
    assert write(out) == ["one", "two"] and os.listdir(tmp_path) == ["o"]


def test_a_writer_killed_before_its_first_part_is_no_stranger(out, tmp_path):
    for size in (0, 4):  # nothing of the key, or the beginning of it
        out.with_name("o.partial").touch()
        out.with_name("o.partial.journal").write_bytes(b'{"ke'[:size])
        assert write(out) == ["one", "two"]


def test_a_journal_that_another_writer_has_removed_is_not_locked(out, tmp_path, monkeypatch):
    """Opened before the other's end, locked behind it: the lock is on a file without a name, which shuts nobody out."""
    flock, calls = resume.fcntl.flock, []

    def late(fd, how):
        calls.append(fd)
        if len(calls) == 1:
            out.with_name("o.partial.journal").unlink()  # the other one is done, just now
        flock(fd, how)

    monkeypatch.setattr(resume.fcntl, "flock", late)
    with resumable_file(out, "key", 2 * len(BODY)) as partial:
        with pytest.raises(UserError, match="another process is writing"):
            write(out)
        partial.write("one", 0, BODY), partial.write("two", len(BODY), BODY)
    assert out.read_bytes() == 2 * BODY and os.listdir(tmp_path) == ["o"]


def test_a_full_disk_shows_at_once_and_leaves_nothing(out, tmp_path, monkeypatch):
    def full(fd, at, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="the disk is full"):
        write(out)
    assert os.listdir(tmp_path) == []


def test_a_journal_that_cannot_be_begun_is_not_left(out, tmp_path, monkeypatch):
    def fails(fd, size):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "ftruncate", fails)
    with pytest.raises(UserError, match="Input/output error"):
        write(out)
    assert os.listdir(tmp_path) == []
