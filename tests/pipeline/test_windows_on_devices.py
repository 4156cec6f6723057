"""Eight devices, windows over all of them, and the bytes of one."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import hashlib, json, sys
from pathlib import Path
import dataclasses
from tiny_walks import CONFIG, plan_of, tiny_calibration
from qjax.pipeline import quantize_file
from test_pipeline import write_model
from qjax.models import devices

used, spread = {}, devices.spread
def told(program, static):
    call = spread(program, static)
    def watched(whole, rows):
        found = call(whole, rows)
        for leaf in __import__("jax").tree.leaves(found):
            used.setdefault(program.__name__, set()).add(len(leaf.sharding.device_set))
        return found
    return watched
devices.spread = told

def lively(tensors):
    for name in tensors:
        if tensors[name].ndim == 2:
            tensors[name] *= 20 if name == "token_embd.weight" else 3

folder = Path(sys.argv[1])
model = write_model(folder / "m.gguf", dataclasses.replace(CONFIG, layers=1), edit=lively)
recipe = "nearest('h') >> ldlq('act') >> options(sensitive=True)"
calibration = tiny_calibration(windows=19, heldout=2)
quantize_file(model, folder / "q.gguf", plan_of(("*", "Q4_0")), recipe=recipe, calibration=calibration)
print(json.dumps([hashlib.sha256((folder / "q.gguf").read_bytes()).hexdigest(), {k: list(v) for k, v in used.items()}]))
"""


def quantized(folder, count):
    """(the file's hash, on how many devices the results of each program lay) of a process with so many devices."""
    folder.mkdir()
    here = os.path.dirname(__file__)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    path = os.pathsep.join([os.getcwd(), here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_windows_use_all_devices_and_the_bytes_are_those_of_one(tmp_path):
    """17 windows in steps of 2: a round of eight, a short step; two held out. Survey, statistics and blocks."""
    one, alone = quantized(tmp_path / "one", 1)
    eight, used = quantized(tmp_path / "eight", 8)
    assert alone == {}
    assert used == {name: [8] for name in ("_run", "_head_step", "block_step", "observe_step")}
    assert eight == one
