"""A file or folder appears whole or not at all, and what goes wrong is one line."""

import errno
import fcntl
import os
import resource
import signal

import pytest

from qjax.errors import UserError
from qjax.io import atomic
from qjax.io.atomic import atomic_dir, atomic_file, write_text
from qjax.pipeline.resume import resumable_file


def test_file_replaces_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with atomic_file(path) as f:
        f.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_exception_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyError), atomic_file(path) as f:
        f.write(b"half")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_real_disk_limit(tmp_path):
    """A limit of the file size fails the write in the kernel, after part of the bytes went through."""
    path = tmp_path / "big"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*big: the file grew past"), atomic_file(path) as f:
            f.write(b"x" * (1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "permission denied")]
)
def test_failure_at_each_step(tmp_path, monkeypatch, step, number, reason):
    def fail(*_):
        raise OSError(number, "Bad thing")

    monkeypatch.setattr(atomic.os, step, fail)
    with pytest.raises(UserError, match=rf"cannot write .*a\.txt: {reason}") as e:
        write_text(tmp_path / "a.txt", "text")
    assert "\n" not in str(e.value)
    assert os.listdir(tmp_path) == []


def test_bad_targets(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        write_text(tmp_path / "absent" / "a", "x")
    with pytest.raises(UserError, match="it is a folder"):
        write_text(tmp_path, "x")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="it is a file"), atomic_dir(tmp_path / "file"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="permission denied"):
        write_text(tmp_path / "a", "x")


def test_dir(tmp_path):
    out = tmp_path / "out"
    for text in ("one", "two"):  # the second save replaces the first
        with atomic_dir(out) as folder:
            (folder / "a").write_text(text)
        assert (out / "a").read_text() == text
        assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(KeyError), atomic_dir(out) as folder:
        (folder / "a").write_text("half")
        raise KeyError
    assert (out / "a").read_text() == "two"
    assert os.listdir(tmp_path) == ["out"]


def test_dir_never_deletes_what_is_not_its_own(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds 'thesis\.tex'"), atomic_dir(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]


def test_a_folder_in_the_way_is_never_deleted(tmp_path):
    """Not even where a file of that name would take its place."""
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds 'a'"), atomic_dir(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert (tmp_path / "out" / "a" / "thesis.tex").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_a_folder_is_one_step_where_the_system_can(tmp_path, monkeypatch, exchange):
    """The name is taken whenever a rename is made; without renameat2 the old folder steps aside first."""
    out, seen = tmp_path / "out", []
    rename = os.rename
    monkeypatch.setattr(atomic.os, "rename", lambda a, b: (rename(a, b), seen.append(out.exists())))
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    for text in ("one", "two"):
        with atomic_dir(out) as folder:
            (folder / "a").write_text(text)
    assert (out / "a").read_text() == "two" and os.listdir(tmp_path) == ["out"]
    assert seen == ([True] if exchange else [True, False, True])


def test_a_link_to_a_folder_is_replaced_and_what_it_names_is_left(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_text("old")
    (tmp_path / "out").symlink_to("there")
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "out" / "a").read_text() == "new" and (tmp_path / "there" / "a").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["out", "there"]


def test_what_dead_writers_left_is_cleared_away_and_nothing_else(tmp_path):
    dead, alive, other = (tmp_path / n for n in (".a.0123abcd.tmp", ".a.aaaabbbb.tmp", ".b.0123abcd.tmp"))
    folder, foreign, link = tmp_path / ".a.00000000.tmp", tmp_path / ".a.notes.tmp", tmp_path / ".a.11111111.tmp"
    for file in (dead, alive, other, foreign):
        file.touch()
    folder.mkdir()
    (folder / "model.safetensors").touch()
    link.symlink_to(other)
    with open(alive) as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        write_text(tmp_path / "a", "text")
        with atomic_dir(tmp_path / "a2"):
            pass
    assert sorted(os.listdir(tmp_path)) == sorted(["a", "a2", alive.name, other.name, foreign.name, link.name])


def test_a_writer_is_not_taken_for_dead(tmp_path):
    """Two writers of one name at once: each has its own temporary, and the later one's is what stays."""
    with atomic_file(tmp_path / "a") as f, atomic_file(tmp_path / "a") as g:
        f.write(b"first"), g.write(b"second")
    assert (tmp_path / "a").read_bytes() == b"first"  # closed last
    with atomic_dir(tmp_path / "d") as one:
        with atomic_dir(tmp_path / "d") as two:
            (two / "x").write_text("two")
        (one / "x").write_text("one")
    assert (tmp_path / "d" / "x").read_text() == "one"
    assert sorted(os.listdir(tmp_path)) == ["a", "d"]


@pytest.mark.parametrize("make", ["file", "folder", "resumed"])
def test_a_name_that_is_not_on_disk_yet_is_said_and_what_has_it_stays(tmp_path, monkeypatch, make):
    """The folder's own fsync fails, behind the rename: the output stands there whole."""
    fsync = os.fsync

    def fails_on_the_parent(fd):
        if os.path.samestat(os.fstat(fd), tmp_path.stat()):
            raise OSError(errno.EIO, "input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fails_on_the_parent)
    path = tmp_path / "out"
    with pytest.raises(UserError, match="out is written, but its name may not survive a power cut"):
        if make == "file":
            write_text(path, "whole")
        elif make == "folder":
            with atomic_dir(path) as folder:
                (folder / "a").write_text("whole")
        else:
            with resumable_file(path, key="k", size=5) as partial:
                partial.write("all", 0, b"whole")
    assert ((path / "a") if make == "folder" else path).read_text() == "whole"


def test_a_file_in_a_folder_that_fails_is_said_by_the_folder(tmp_path, folders_that_do_not_sync):
    """The folder goes away with all that is in it, so nothing "is written", and nobody knows its temporary name."""
    with pytest.raises(UserError, match=r"cannot write \S*/out: input/output error"), atomic_dir(tmp_path / "out") as d:
        write_text(d / "a", "1")
    assert not os.listdir(tmp_path)
