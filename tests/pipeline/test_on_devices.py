"""Eight devices, and two processes: windows and rows of weights over all of them, and the bytes of one."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from several_processes import ends_of, free_port, run_together

import qjax
from qjax.pipeline import parts
from qjax.rounding import round_weight
from qjax.stats import Stats

SCRIPT = """
import hashlib, json, os, signal, sys
from qjax.processes import chief_first, joined

folder, line, *killed = sys.argv[1:]
with joined(line or None):
    from pathlib import Path
    import dataclasses
    import jax
    from tiny_walks import CONFIG, plan_of, tiny_calibration
    from qjax.models import parts as models_parts
    from qjax.pipeline import inputs, parts, passes, quantize_file, survey
    from test_pipeline import write_model

    used, each_step, compiled = {}, passes.each_step, parts._program
    def watched(name, program):
        def call(*args):
            found = program(*args)
            where, calls = used.get(name, (set(), 0))
            for leaf in jax.tree.leaves(found):
                where |= {d.id for d in leaf.sharding.device_set}
            used[name] = where, calls + 1
            return found
        return call
    for module in (models_parts, inputs, passes, survey):
        module.each_step = lambda program, *others: each_step(watched(program.__name__, program), *others)
    parts._program = lambda *kind: watched("round_weight", compiled(*kind))

    def lively(tensors):
        for name in tensors:
            if tensors[name].ndim == 2:
                tensors[name] *= 20 if name == "token_embd.weight" else 3

    folder = Path(folder)
    model = folder / "m.gguf"
    with chief_first("model"):
        if not model.exists():
            write_model(model, dataclasses.replace(CONFIG, hidden=2048), edit=lively)

    def walked(step):
        if step.path in killed:
            os.kill(os.getpid(), signal.SIGKILL)

    said = []
    recipe = "nearest('h') >> ldlq('act') >> options(sensitive=True)"
    calibration = tiny_calibration(windows=19, heldout=2)
    plan = plan_of(("layers_0/mlp/down/kernel", "keep"), ("*", "Q4_0"))
    report = quantize_file(
        model, folder / "q.gguf", plan, recipe=recipe, calibration=calibration, walked=walked, notify=said.append
    )
    losses = [t.calibration and t.calibration.loss for t in report.tensors]
    calls = {name: [sorted(where), calls] for name, (where, calls) in used.items()}
    print(json.dumps([hashlib.sha256((folder / "q.gguf").read_bytes()).hexdigest(), losses, calls, said]))
"""
SHARED = {"run", "_head_step", "block_step", "observe_step", "round_weight"}
"""What devices and processes share: blocks, the head, their gradients, statistics; rounding."""


def command(folder, line="", killed=""):
    return [sys.executable, "-c", SCRIPT, str(folder), line, killed]


def environment(count):
    """Of a process with so many devices."""
    here = os.path.dirname(__file__)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    path = os.pathsep.join([os.getcwd(), here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


def told(output):
    """The file's hash, the weights' losses, of each program where its results lay and its calls, and what was said."""
    return json.loads(output.splitlines()[-1])


def alone(folder, count):
    folder.mkdir()
    done = subprocess.run(command(folder), capture_output=True, text=True, env=environment(count))
    assert done.returncode == 0, done.stderr[-2000:]
    return told(done.stdout)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(hash, losses) of one process with one device."""
    file, losses, used, _ = alone(tmp_path_factory.mktemp("one") / "one", 1)
    assert used.keys() == SHARED and all(where == [0] for where, _ in used.values())
    return file, losses


@pytest.mark.slow
def test_windows_and_rows_use_all_devices_and_the_bytes_are_those_of_one(one, tmp_path):
    """17 windows in steps of 2: a round of eight, a short step; two held out. Survey, statistics and blocks; weights of
    2048 rows in parts of 256."""
    file, losses, used, _ = alone(tmp_path / "eight", 8)
    assert {name: where for name, (where, _) in used.items()} == {name: list(range(8)) for name in SHARED}
    assert (file, losses) == one


@pytest.mark.slow
def test_two_processes_share_a_walk_that_is_killed_and_write_the_bytes_of_one(one, tmp_path):
    """Killed in the second block: process 0 at once, the other by its loss. Then all goes on from process 0's state."""
    where, env = f"127.0.0.1:{free_port()}/2", environment(1)
    killed = [command(tmp_path, f"{where}/{p}", "layers_1/mlp/gate/kernel" if p == 0 else "") for p in range(2)]
    (first, said), (second, _) = ends_of(killed, env, timeout=300)
    state = tmp_path / "q.gguf.partial.calibration"
    assert first == -signal.SIGKILL and second != 0, said
    assert not (tmp_path / "q.gguf").exists() and (state / "process_1" / "state.json").exists()
    (state / "process_1" / "x_1.f32").write_bytes(b"of no use")  # nobody reads it again

    where = f"127.0.0.1:{free_port()}/2"
    outputs = run_together([command(tmp_path, f"{where}/{p}") for p in range(2)], env, timeout=300)
    for file, losses, used, said in map(told, outputs):
        assert (file, losses) == one
        # Of ten steps two are left over, and both run them: to o, to gate and up, to down, to the end. Seen are the
        # inputs of up, of down, of the head; up has eight parts, down and the head one. The survey stood, and gate.
        assert {name: calls for name, (_, calls) in used.items()} == {
            "run": 4 * (4 + 2), "observe_step": 3 * (4 + 2), "round_weight": 4 + 1 + 1,
        }  # fmt: skip
        assert said[-1].endswith("continuing behind block 1 of 2"), said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "q.gguf"]


def test_parts_on_devices_are_the_rows_of_the_weight(rng, monkeypatch):
    """Three parts of 256 rows and their fits, the last short, on three of eight devices: what `round_weight` makes of
    all rows at once."""
    x = rng.standard_normal((512, 32)) @ rng.standard_normal((32, 32))
    stats = Stats(H=jnp.asarray(x.T @ x / 512, jnp.float32))
    w, format = jnp.asarray(rng.standard_normal((700, 32)), jnp.float32), qjax.format("Q4_0")
    recipe = qjax.recipe("nearest('h') >> ldlq('act')")
    fit = format.encode(w, jnp.broadcast_to(stats.importance, w.shape))
    used, compiled = set(), parts._program
    monkeypatch.setattr(parts, "_program", lambda device, *kind: used.add(device.id) or compiled(device, *kind))
    made = parts.in_parts(w, format, recipe, stats, None, fit)
    whole = round_weight(w, format, recipe.roundings, stats, recipe.damping)
    assert made.codes.shape == whole.codes.shape and used == {0, 1, 2} and len(jax.local_devices()) == 8
    assert np.mean(np.asarray(made.codes) == np.asarray(whole.codes)) > 0.999  # ties fall otherwise in other programs
    np.testing.assert_allclose(made.error, whole.error, rtol=1e-3)
    np.testing.assert_allclose(made.energy, whole.energy, rtol=1e-5)


def test_accelerators_share_the_rows_evenly(monkeypatch):
    """One program on each device: the rows of a part are as many as that takes, in whole parts of 256."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(parts, "at_once", lambda: 8)
    assert [parts._height(rows, 256) for rows in (8192, 4096, 1000, 28672)] == [1024, 512, 256, 3584]
