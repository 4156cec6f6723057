"""From file to file: a walk that was stopped goes on behind its last finished block; the bytes do not show it."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_pipeline import write_model
from tiny_walks import CONFIG, plan_of, tiny_calibration

import qjax
from qjax.errors import UserError
from qjax.pipeline import quantize_file, quantize_model, walk
from qjax.pipeline.activations import Writer
from qjax.pipeline.massive import Massive
from qjax.pipeline.survey import Survey
from qjax.pipeline.walk_folder import key_of, walk_folder
from qjax.pipeline.walk_state import resumed, save_survey, saved_survey

RECIPE = "nearest('h') >> ldlq('act', cross=1.0) >> options(sensitive=True)"
PLAN = plan_of(("layers_0/mlp/up/kernel", "keep"), ("*", "Q4_0"))
CALIBRATION = tiny_calibration()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    def lively(tensors):
        for name in tensors:
            if tensors[name].ndim == 2:
                tensors[name] *= 20 if name == "token_embd.weight" else 3

    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", CONFIG, edit=lively)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """(bytes, report, steps) of a run that nobody stopped."""
    folder, steps = tmp_path_factory.mktemp("whole"), []
    report = run(model, folder / "q.gguf", walked=steps.append)
    assert os.listdir(folder) == ["q.gguf"]
    return (folder / "q.gguf").read_bytes(), report, steps


def run(model, out, plan=PLAN, recipe=RECIPE, calibration=CALIBRATION, **options):
    return quantize_file(model, out, plan, recipe=recipe, calibration=calibration, **options)


def interrupt(model, out, behind, recipe=RECIPE):
    """Ctrl-C after the weight `behind`."""

    def walked(step):
        if step.path == behind:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, out, recipe=recipe, walked=walked)
    state = out.with_name(out.name + ".partial.calibration")
    assert not out.exists() and state.is_dir()
    return state


def without_time(report):
    return [
        dataclasses.replace(t, calibration=t.calibration and dataclasses.replace(t.calibration, seconds=0.0))
        for t in report.tensors
    ]


STOPS = {  # behind which weight -> (blocks that are done, weights that are not walked past again)
    "embed/embedding": (0, 0),
    "layers_0/attn/v/kernel": (0, 1),
    "layers_1/attn/o/kernel": (1, 7),
    "head/kernel": (0, 15),  # all weights: between the walk and the file's name
}


@pytest.mark.slow
@pytest.mark.parametrize("behind", STOPS)
def test_an_interrupted_walk_is_continued(model, whole, tmp_path, behind, monkeypatch):
    raw, report, all_steps = whole
    blocks, skipped = STOPS[behind]
    out = tmp_path / "q.gguf"
    interrupt(model, out, behind)
    messages, steps, rounded = [], [], []

    def round_leaf(name, *args):
        rounded.append(name)
        return real(name, *args)

    real = walk.round_leaf
    monkeypatch.setattr(walk, "round_leaf", round_leaf)
    again = run(model, out, notify=messages.append, walked=steps.append)
    assert rounded == [s.path for s in all_steps[[s.path for s in all_steps].index(behind) + 1 :]]
    assert out.read_bytes() == raw
    assert os.listdir(tmp_path) == ["q.gguf"]
    assert any(m.endswith(f"continuing behind block {blocks} of 2") for m in messages) == (blocks > 0), messages
    assert [(s.path, s.done, s.total) for s in steps] == [(s.path, s.done, s.total) for s in all_steps[skipped:]]
    assert without_time(again) == without_time(report)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["recipe", "tokens", "heldout", "seed", "plan"])
def test_the_state_of_another_run_is_not_continued(model, tmp_path, change):
    out = tmp_path / "q.gguf"
    interrupt(model, out, "layers_1/attn/o/kernel")
    plan = plan_of(("layers_1/mlp/up/kernel", "keep"), ("*", "Q4_0"))
    c = CALIBRATION
    options = {
        "recipe": {"recipe": RECIPE.replace("1.0", "0.5")},
        "tokens": {"calibration": dataclasses.replace(c, tokens=c.tokens[:, ::-1])},
        "heldout": {"calibration": dataclasses.replace(c, heldout=4)},
        "seed": {"calibration": dataclasses.replace(c, seed=1)},
        "plan": {"plan": plan},
    }[change]
    messages, steps = [], []
    run(model, out, notify=messages.append, walked=steps.append, **options)
    assert "starting over" in messages[0] and not any("continuing" in m for m in messages)
    assert steps[0].path == "embed/embedding" and steps[0].done == 1
    run(model, tmp_path / "whole.gguf", **options)
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["the partial file", "the residual stream", "the survey", "one tensor's bytes"])
def test_a_state_with_a_part_lost_is_made_good(model, whole, tmp_path, lost):
    """As after a power cut, or a hand that tidied up."""
    out = tmp_path / "q.gguf"
    state = interrupt(model, out, "layers_1/attn/o/kernel")
    partial = tmp_path / "q.gguf.partial"
    if lost == "the partial file":
        partial.unlink()
        Path(f"{partial}.journal").unlink()
    elif lost == "the residual stream":
        (state / "x_1.f32").unlink()
    elif lost == "the survey":
        (state / "survey.npz").unlink()
    else:
        import gguf

        (tmp_path / "whole").write_bytes(whole[0])
        places = {t.name: t.data_offset for t in gguf.GGUFReader(tmp_path / "whole").tensors}
        (tmp_path / "whole").unlink()
        with open(partial, "r+b") as f:
            f.seek(places["blk.0.attn_q.weight"] + 7)
            f.write(b"\x55\xaa")
    run(model, out)
    assert out.read_bytes() == whole[0]
    assert os.listdir(tmp_path) == ["q.gguf"]


@pytest.mark.slow
def test_one_flipped_bit_of_the_stream_is_seen(model, whole, tmp_path):
    """Nothing else would show it."""
    out = tmp_path / "q.gguf"
    file = interrupt(model, out, "layers_1/attn/o/kernel") / "x_1.f32"
    raw = bytearray(file.read_bytes())
    raw[1000] ^= 1
    file.write_bytes(raw)
    messages = []
    run(model, out, notify=messages.append)
    assert any(m.endswith("x_1.f32: damaged; starting over") for m in messages), messages
    assert out.read_bytes() == whole[0] and os.listdir(tmp_path) == ["q.gguf"]


def test_a_damaged_key_empties_the_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), walk_folder(tmp_path / "q.gguf", "key") as folder:
        (folder / "x_0.f32").touch()
        raise KeyboardInterrupt
    (folder / "key").write_bytes(b"\xff\xfe")
    said = []
    with walk_folder(tmp_path / "q.gguf", "key", said.append) as folder:
        assert os.listdir(folder) == ["key"]
    assert said == [f"{folder / 'key'}: of another run, or damaged; starting over"] and os.listdir(tmp_path) == []


def test_damaged_states_in_detail(tmp_path):
    """Nothing that can be in a file gets past `resumed` and `saved_survey`."""
    shape = (2, 3, 4)
    for raw in (b"", b"[1]", b"{}", b'{"blocks": 1}', b'{"blocks": -1, "crc32": {}}', b'{"blocks": 1, "crc32": 3}',
                b'{"blocks": 1, "crc32": {"x_1.f32": "a"}}', b"[" * 100_000, b"\xff"):  # fmt: skip
        (tmp_path / "state.json").write_bytes(raw)
        (tmp_path / "x_1.f32").write_bytes(bytes(4 * 24))
        said = []
        assert resumed(tmp_path, shape, False, said.append) == (0, None) and len(said) == 1, raw
    massive = (Massive(3, 0, 1, 2e3, 0.25, (0,)),)
    made = Survey(np.eye(4), np.eye(4), 6, (np.ones((1, 2, 3)),), np.ones((2, 3)), np.ones((1, 2, 3), bool), massive)
    save_survey(tmp_path, made)
    assert saved_survey(tmp_path, 1, shape).tokens == 6
    whole = (tmp_path / "survey.npz").read_bytes()
    for blocks, other in ((2, shape), (1, (2, 3, 5)), (1, (9, 3, 4))):
        assert saved_survey(tmp_path, blocks, other) is None
    data = whole.index(np.eye(4).tobytes()) + 9
    flipped = bytearray(whole)
    flipped[data] ^= 1
    for raw in (b"", whole[:-40], bytes(flipped), whole.replace(b"NUMPY", b"NUMPI"), whole[::-1]):
        (tmp_path / "survey.npz").write_bytes(raw)
        said = []
        assert saved_survey(tmp_path, 1, shape, said.append) is None and len(said) == 1, raw[:9]


def test_a_folder_that_no_walk_made_is_left(tmp_path):
    out, mine = tmp_path / "q.gguf", tmp_path / "q.gguf.partial.calibration"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"partial.calibration: .* holds 'thesis.tex'"), walk_folder(out, "key"):
        pass
    assert os.listdir(mine) == ["thesis.tex"]
    mine.rename(tmp_path / "elsewhere")
    mine.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="it is no folder"), walk_folder(out, "key"):
        pass
    assert os.listdir(tmp_path / "elsewhere") == ["thesis.tex"]


def test_the_number_of_threads_is_a_part_of_the_key(monkeypatch):
    """It shows in the bytes of what is calibrated: sums over tokens are cut into as many parts. Nowhere else."""
    formats = {"w": (qjax.format("Q4_0"), qjax.recipe("best_gguf"))}
    plain, calibrated = key_of(formats, None), key_of(formats, CALIBRATION)
    monkeypatch.setenv("PJRT_NPROC", "97")
    assert key_of(formats, CALIBRATION) != calibrated and key_of(formats, None) == plain


ON_CORES = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv[1])])
from qjax.compiled import lapack_on_one_thread, threads, threads_whatever_the_cores
threads_whatever_the_cores()
import hashlib, jax, numpy as np
from qjax.calibrate.moments import means, sums
from qjax.rounding.curvature import cholesky
x = np.random.default_rng(0).standard_normal((4096, 640)).astype(np.float32)
found = means(jax.jit(lambda x: sums(x, ("H", "h", "absmean", "cross"), x * x))(x))
with lapack_on_one_thread():
    factor, _ = jax.block_until_ready(jax.jit(lambda H: cholesky(H, 0.05))(found.H))
made = b"".join(np.asarray(a).tobytes() for a in (*jax.tree.leaves(found), factor))
print(threads(), hashlib.sha256(made).hexdigest())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_one_core_and_all_give_the_same_statistics_and_factors():
    """By a command; the statistics of a program that does not ask for it differ between one core and two."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "OMP_NUM_THREADS", "PJRT_NPROC")}
    one, all_cores = (
        subprocess.run([sys.executable, "-c", ON_CORES, n], capture_output=True, text=True, env=env, check=True).stdout
        for n in ("1", "64")
    )
    assert one == all_cores and int(one.split()[0]) >= 8


def test_the_number_of_accelerators_is_a_part_of_the_key(monkeypatch):
    """They share a weight's rows evenly, which shows in the bytes; devices of a CPU take the parts that one takes."""
    formats, keys = {"w": (qjax.format("Q4_0"), qjax.recipe("best_gguf"))}, {}
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        for count in (1, 8):
            monkeypatch.setattr(jax, "device_count", lambda count=count: count)
            keys[backend, count] = key_of(formats, CALIBRATION)
    assert keys["cpu", 1] == keys["cpu", 8] and len(set(keys.values())) == 3


def test_a_full_disk_is_an_error_and_no_dead_process(tmp_path, monkeypatch):
    """SIGBUS, where the stream's file has no room for a page that was written in memory."""

    def full(fd, at, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    said = pytest.raises(UserError, match=r"cannot write .*q\.gguf: the disk is full")
    with said, walk_folder(tmp_path / "q.gguf", "key") as folder:
        Writer(folder, "x_0", (2, 3, 4))
    assert os.listdir(tmp_path) == []


def test_a_mistake_leaves_nothing(model, tmp_path):
    out = tmp_path / "q.gguf"
    interrupt(model, out, "layers_1/attn/o/kernel")

    def walked(step):
        raise qjax.errors.UserError("no")

    with pytest.raises(qjax.errors.UserError):
        run(model, out, walked=walked)
    assert os.listdir(tmp_path) == []


def test_file_and_memory_give_the_same_weights(model, whole, tmp_path):
    (tmp_path / "q.gguf").write_bytes(whole[0])
    ours, report = quantize_model(qjax.load(model), PLAN, RECIPE, CALIBRATION)
    theirs = qjax.load(tmp_path / "q.gguf")
    jax.tree.map(np.testing.assert_array_equal, ours.dense, theirs.dense)
    lines, names = {t.name: t for t in report.tensors}, dict(zip(*paths_and_names(), strict=True))
    for t in report.tensors:
        other = {x.name: x for x in whole[1].tensors}[names[t.name]]
        assert (t.error is None) == (other.error is None) == (lines[t.name].calibration is None)
        if t.calibration:
            assert other.calibration.loss == pytest.approx(t.calibration.loss, rel=1e-5)
            assert other.error == pytest.approx(t.error, rel=1e-5)


def paths_and_names():
    from qjax.models.families import weight_names

    found = weight_names(CONFIG)
    return ["/".join(w.path) for w in found], [w.gguf for w in found]


KILLED = """
import os, signal, sys
from test_walk_resume import PLAN, CALIBRATION
from qjax.pipeline import quantize_file
def walked(step):
    if step.path == "layers_1/mlp/gate/kernel":
        os.kill(os.getpid(), signal.SIGKILL)
quantize_file(sys.argv[1], sys.argv[2], PLAN, recipe=sys.argv[3], calibration=CALIBRATION, walked=walked)
"""


@pytest.mark.slow
def test_a_killed_walk_is_continued(model, tmp_path):
    out = tmp_path / "q.gguf"
    here = Path(__file__).parent
    path = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    argv = [sys.executable, "-c", KILLED, str(model), str(out), "best_gguf"]
    died = subprocess.run(argv, capture_output=True, env=path)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not out.exists() and (tmp_path / "q.gguf.partial.calibration" / "state.json").exists()
    messages = []
    run(model, out, recipe="best_gguf", notify=messages.append)
    assert messages[-1].endswith("continuing behind block 1 of 2")
    assert os.listdir(tmp_path) == ["q.gguf"]
    run(model, tmp_path / "whole.gguf", recipe="best_gguf")
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_folder_that_cannot_be_begun_is_not_left(tmp_path, folders_that_do_not_sync):
    said = pytest.raises(UserError, match=r"cannot write \S*/q.gguf: input/output error")
    with said, walk_folder(tmp_path / "q.gguf", "key"):
        pass
    assert not os.listdir(tmp_path)
