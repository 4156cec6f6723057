"""A full disk is an error in time, never a signal: what is mapped has its space."""

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from qjax.errors import UserError
from qjax.evaluate.divergence import make_baseline
from qjax.evaluate.perplexity import Windows
from qjax.io.space import let_go, mapped, scratch


@pytest.fixture
def full(monkeypatch):
    def refuse(fd, at, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)


def test_a_mapping_has_its_space_before_it_is_written(tmp_path):
    """A sparse file on a full disk would kill the process at the first page that finds no room."""
    with open(tmp_path / "m", "w+b") as f:
        assert mapped(f, "f4", (3, 1024)).shape == (3, 1024)
        assert os.fstat(f.fileno()).st_blocks * 512 >= 4 * 3 * 1024


def test_no_space_for_a_mapping(tmp_path, full):
    with open(tmp_path / "n", "w+b") as f, pytest.raises(OSError, match="No space left"):
        mapped(f, "f4", (3, 1024))


def test_scratch_is_an_array_and_leaves_nothing(tmp_path):
    a = scratch(np.float32, (2, 3), tmp_path)
    a[:] = 7
    assert a.sum() == 42 and os.listdir(tmp_path) == []


def test_a_full_folder_for_temporary_files_is_one_line(tmp_path, full, monkeypatch):
    """What `eval --baseline` keeps there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def logits(params, tokens):
        return params[tokens]

    with pytest.raises(UserError, match=rf"cannot keep 480 bytes in {tmp_path}: the disk is full; .* TMPDIR"):
        make_baseline(logits, np.zeros((8, 8), np.float32), Windows(np.zeros((3, 6), np.int32), 0, "llama.cpp"))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
def test_pages_that_are_let_go_are_resident_no_more_and_keep_what_they_hold(tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    array = scratch(np.float32, (32, 1 << 20), tmp_path)
    array[:] = np.arange(32, dtype=np.float32)[:, None]
    held = resident()
    let_go(array, np.ones(3), None)
    assert held - resident() > 0.9 * array.nbytes
    np.testing.assert_array_equal(array[:, -1], np.arange(32))
