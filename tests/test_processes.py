"""Several processes: what one has, for all; how they end; two of `qjax run --join` train what one does."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from several_processes import ends_of, free_port, run_together
from test_cli_models import folder, text  # noqa: F401  (fixtures)

import qjax
from qjax import processes
from qjax.cli.run import Run
from qjax.errors import UserError
from qjax.processes import by_chief, check_alike, chief_first, join, of_all, of_chief, said_by_chief, whole

CONFIG = """
script = "{script}"
vocab = 300
dim = 32
hidden = 64
layers = 2
heads = 2
kv_heads = 2
context = 32
steps = 4
batch = 4
warmup = 2
peak_rate = 2e-2
log_every = 1
eval_every = 4
checkpoint_every = 2
eval_windows = 2
mixed = false
text = "{text}"
heldout = "{heldout}"
"""


def command(config, out, *more):
    return [sys.executable, "-m", "qjax", "run", str(config), "--out", str(out), *more]


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_pretrain_what_one_does(tmp_path, rng, pytestconfig):
    for name, lines in (("text", 400), ("heldout", 60)):
        words = rng.choice(["alpha", "beta", "gamma", "delta", "epsilon"], (lines, 8))
        (tmp_path / name).write_text("\n".join(" ".join(line) for line in words))
    config = tmp_path / "tiny.toml"
    script = pytestconfig.rootpath / "experiments" / "pretrain.py"
    config.write_text(CONFIG.format(script=script, text=tmp_path / "text", heldout=tmp_path / "heldout"))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    alone = subprocess.run(command(config, tmp_path / "one"), env=env, text=True, capture_output=True)
    assert alone.returncode == 0, alone.stderr

    where = f"127.0.0.1:{free_port()}/2"
    lines = [["--join", f"{where}/{p}", "--devices.data=1", "--devices.fsdp=2"] for p in range(2)]
    run_together([command(config, tmp_path / "two", *line) for line in lines], env, timeout=400)
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [r["step"] for r in two] == [1, 2, 3, 4]  # written once
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a.get("heldout", 0) - b.get("heldout", 0)) < 1e-5
    models = [qjax.load(tmp_path / out / "model").params for out in ("one", "two")]
    # written as bfloat16: a last digit of 8 may differ
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-7, atol=1e-5), *models)
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["exit_status"] == 0
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == sorted(p.name for p in (tmp_path / "two").iterdir())


TOLD = """
import sys
import jax, numpy as np
from qjax.errors import UserError
from qjax.processes import check_alike, joined, of_all, of_chief, said_by_chief

with joined(sys.argv[1]):
    me = jax.process_index()
    found = of_all({"a": np.full((2, 3), me, np.int8), "b": [np.asarray([me == 1])]})
    assert np.asarray(found["a"]).tolist() == [[0] * 3] * 2 + [[1] * 3] * 2 and found["b"][0].tolist() == [False, True]
    assert of_chief(np.arange(3) + 5 * me).tolist() == [0, 1, 2]
    assert said_by_chief("first\\u00e9" if me == 0 else "") == "first\\u00e9"
    check_alike("same", "the text")
    try:
        check_alike(f"text {me}", "the text")
    except UserError as e:
        assert str(e).startswith(f"processes {me} and {1 - me} of this run differ in the text:"), e
    else:
        raise AssertionError
    print("all told", flush=True)
    if me == 0:
        raise UserError("the disk is full")
    said_by_chief("")
"""


@pytest.mark.slow
def test_two_processes_know_what_the_others_have_and_end_together():
    where = f"127.0.0.1:{free_port()}/2"
    commands = [[sys.executable, "-c", TOLD, f"{where}/{p}"] for p in range(2)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    (first, said), (second, other) = ends_of(commands, env, timeout=90)  # below JAX's patience with a silent process
    assert "all told" in said and "all told" in other, said + other
    assert first == 2 and second != 0 and "the disk is full" in said


@pytest.mark.slow
@pytest.mark.parametrize("out", ["q.gguf", "q"])
def test_two_processes_quantize_what_one_does(folder, text, tmp_path, out):  # noqa: F811
    """The walk of a file and that of a model in memory; the first process writes, and says what."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    where, recipe = f"127.0.0.1:{free_port()}/2", "nearest('h') >> ldlq('act')"

    def quantize(to, *more):
        options = ["--type", "Q8_0", "--recipe", recipe, "--calib", str(text), "--calib-ctx", "16"]
        return [sys.executable, "-m", "qjax", "quantize", str(folder), "-o", str(to / out), *options, *more]

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_together([quantize(tmp_path / "one")], env, timeout=300)
    first, second = run_together([quantize(tmp_path / "two", "--join", f"{where}/{p}") for p in range(2)], env, 300)
    assert "bits per weight" in first and "bits per weight" not in second
    one, two = ({p.relative_to(to): p.read_bytes() for p in to.rglob("*") if p.is_file()}
                for to in (tmp_path / "one", tmp_path / "two"))  # fmt: skip
    assert one == two and (out in map(str, one)) == (out == "q.gguf")


def test_one_process_needs_none_of_it(tmp_path):
    own = np.ones(2)
    assert of_all(own) is own and of_chief(own) is own and said_by_chief("a") == "a"
    check_alike("a", "b")
    done = []
    with chief_first("a"):
        by_chief("b", lambda: done.append(1))
    assert done == [1]
    tree = {"a": np.ones(2)}
    assert whole(tree) is tree


@pytest.mark.parametrize("line", ["10.0.0.1/2/0", "host:1/2", "host:1/2/2", "host:x/2/0", ""])
def test_a_line_that_says_nothing(line):
    with pytest.raises(UserError, match="HOST:PORT/PROCESSES/PROCESS"):
        join(line)


@pytest.mark.parametrize(("several", "more", "message"), [(False, ["--out", "x"], "one process"), (True, [], "--out")])
def test_what_cannot_join_says_so(several, more, message, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "start_processes", lambda *line: None)
    (tmp_path / "script.py").write_text(
        f"import dataclasses\n\nSEVERAL_PROCESSES = {several}\n\n"
        "@dataclasses.dataclass(frozen=True)\nclass Config:\n    a: int = 1\n\n\ndef run(config, out):\n    return {}\n"
    )
    (tmp_path / "config.toml").write_text('script = "script.py"\n')
    more = [*more, "--scripts", str(tmp_path)]
    with pytest.raises(UserError, match=message):
        Run.parse([str(tmp_path / "config.toml"), "--join", "host:1/2/0", *more]).execute()
