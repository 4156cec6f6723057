"""A disk that fails at any one change: one line, nothing but what was there before, and a rerun makes it good."""

import errno
import os
import resource
from collections import Counter

import numpy as np
import pytest
from tiny_runs import before_changes, calibration, quantized

import qjax
from qjax.errors import UserError

FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)
MAKERS = {
    "file": lambda tiny, model, out: quantized(model, out),
    "calibrated": lambda tiny, model, out: quantized(
        model, out, recipe="nearest('h') >> ldlq('act')", calibration=calibration()
    ),
    "saved": lambda tiny, model, out: qjax.save(tiny, out),
    "folder": lambda tiny, model, out: qjax.save(tiny, out.with_suffix("")),
}


def outcome(make, folder) -> str:
    """How it ended; nothing of work that was refused is left."""
    before = sorted(os.listdir(folder))
    try:
        make()
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error), error
        if "may not survive a power cut" in str(error):  # the sync behind the rename: it stands there whole
            return "written"
        assert sorted(os.listdir(folder)) == before
        return "refused"
    return "made"


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.cases(8)
@pytest.mark.parametrize("name", MAKERS)
def test_a_change_that_fails(tiny, model, tmp_path, name, cases):
    def make(at=None, number=errno.ENOSPC):
        def act(n, real, args):
            seen.append(real.__name__)
            if n == at:
                raise OSError(number, os.strerror(number))

        seen = []
        with before_changes(tmp_path, act):
            MAKERS[name](tiny, model, tmp_path / "q.gguf")
        return seen

    changes = make()
    whole, outcomes = contents(tmp_path), Counter()
    for case in cases[: len(cases) // 2] if name == "calibrated" else cases:
        rng = np.random.default_rng([case, *name.encode()])
        at, number = int(rng.integers(1, len(changes) + 1)), FAULTS[int(rng.integers(len(FAULTS)))]
        if rng.random() < 0.5:  # over an earlier one, or where nothing is
            for p in whole:
                (tmp_path / p).unlink()
            for p in tmp_path.iterdir():
                p.rmdir()
        try:
            ended = outcome(lambda at=at, number=number: make(at, number), tmp_path)
        except BaseException as error:
            error.add_note(f"{name}, case {case}: {errno.errorcode[number]} at change {at}, {changes[at - 1]}")
            raise
        outcomes[ended] += 1
        if ended == "written":
            assert contents(tmp_path) == whole, f"{name}, case {case}"
        make()
        assert contents(tmp_path) == whole, f"{name}, case {case}"
    print(f"faults, {name}: {sum(outcomes.values())} cases among {len(changes)} changes, {dict(outcomes)}")
    assert outcomes["refused"]


@pytest.mark.slow
@pytest.mark.cases(4)
@pytest.mark.parametrize("name", MAKERS)
def test_a_file_that_may_not_grow(tiny, model, tmp_path, name, cases):
    """The kernel's own limit, which buffered writes and those of other libraries meet too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make():
        MAKERS[name](tiny, model, tmp_path / "q.gguf")

    make()
    whole = contents(tmp_path)
    most = max(map(len, whole.values()))
    for case in cases[: len(cases) // 4] if name == "calibrated" else cases:
        rng = np.random.default_rng([case, *name.encode()])
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(rng.integers(most)), limits[1]))
            ended = outcome(make, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert ended == "refused" and contents(tmp_path) == whole, f"{name}, case {case}"


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tiny, model, tmp_path, name):
    tmp_path.chmod(0o555)
    assert outcome(lambda: MAKERS[name](tiny, model, tmp_path / "q.gguf"), tmp_path) == "refused"
    tmp_path.chmod(0o755)
