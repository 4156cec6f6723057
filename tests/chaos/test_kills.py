"""`qjax quantize` killed at any moment: the output is absent or whole, and a rerun gives the bytes of a whole run."""

import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
from small_models import TEXT
from tiny_runs import command

pytestmark = pytest.mark.slow

JOBS = {  # output, options
    "file": ("q.gguf", ["--type", "Q8_0"]),
    "calibrated": (
        "q.gguf",
        ["--type", "Q8_0", "--recipe", "nearest('h') >> ldlq('act', cross=1.0)", "--calib-ctx", "24"],
    ),
    "folder": ("q", ["--type", "MXFP4"]),
    "in place of another": ("q.gguf", ["--type", "Q8_0", "--force"]),
}


@pytest.fixture(scope="module")
def processes():
    """Forks of a process that has imported the library: a start costs a fifth of a new interpreter's."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["qjax.cli.quantize", "qjax.pipeline", "qjax.io.checkpoint"])
    return made


def contents(path):
    """Bytes by name; None where nothing is."""
    if path.is_dir():
        return {p.name: p.read_bytes() for p in path.iterdir()}
    return path.read_bytes() if path.exists() else None


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", JOBS)
def test_killed_and_run_again(processes, model, tmp_path, name, cases):
    target, options = JOBS[name]
    folder, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text(TEXT * 2)
    out = folder / target
    argv = ["quantize", model, "-o", out, *options, *(["--calib", text] if "--recipe" in options else [])]

    def start(kill_at=None):
        process = processes.Process(target=command, args=(argv, folder, kill_at))
        process.start()
        return process

    def before():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if "--force" in options:
            out.write_bytes(b"an earlier one")

    before()
    earlier, began = contents(out), time.monotonic()
    process = start()
    process.join()
    seconds, whole = time.monotonic() - began, contents(out)
    assert process.exitcode == 0 and whole not in (None, earlier)
    changes = int((tmp_path / "out.changes").read_text())
    killed = finished = 0
    for case in cases:
        rng = np.random.default_rng([case, *name.encode()])
        before()
        for _ in range(int(rng.integers(1, 3))):  # once or twice
            by_clock = bool(rng.random() < 0.3)
            at, end = int(rng.integers(1, changes + 1)), time.monotonic() + rng.random() * seconds
            process = start(None if by_clock else at)
            while process.is_alive():
                assert contents(out) in (earlier, whole), f"{name}, case {case}"
                if by_clock and time.monotonic() > end:
                    process.kill()
                process.join(0.05)
            assert process.exitcode in (0, -signal.SIGKILL, 2), f"{name}, case {case}: {process.exitcode}"
            assert contents(out) in (earlier, whole), f"{name}, case {case}"
            killed += process.exitcode == -signal.SIGKILL
            finished += process.exitcode != -signal.SIGKILL
        if contents(out) == earlier:
            process = start()
            process.join()
            assert process.exitcode == 0, f"{name}, case {case}"
        assert contents(out) == whole, f"{name}, case {case}"
        if not finished:
            assert os.listdir(folder) == [target], f"{name}, case {case}"
    print(f"kills, {name}: {len(cases)} cases, {killed} kills among {changes} changes, {finished} ended before theirs")
