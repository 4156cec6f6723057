"""The same numbers on a GPU as on the CPU: what a device shows, and what a compiler for it shows without one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_ahead
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.compiled import UNTUNED, untuned
from qjax.formats.storage import fp16_bits, quotient, round_fp16
from qjax.rounding import round_weight
from qjax.training.grid.fake_quant import fake_quant


@pytest.fixture(scope="module")
def gpu():
    found = [d for d in jax.devices() if d.platform == "gpu"]
    if not found:
        pytest.skip("no GPU")
    return found[0]


@pytest.fixture
def w(rng):
    return (rng.standard_normal((16, 512)) * np.exp(rng.standard_normal((16, 1)))).astype(np.float32)


@pytest.mark.gpu
def test_rounding_and_division(gpu, rng):
    bits = rng.integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    x = jax.device_put(bits[np.isfinite(bits)], gpu)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(jax.jit(fp16_bits)(x), np.asarray(x).astype(np.float16).view(np.uint16))
    a, b = rng.uniform(1, 2, (2, 2**20)).astype(np.float32)
    np.testing.assert_array_equal(quotient(jax.device_put(a, gpu), jax.device_put(b, gpu)), a / b)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "TQ1_0", "MXFP4", "int4_g128", "FP8_E4M3", "NF4"]
)
def test_bytes_are_the_cpus(gpu, w, name):
    def there_and_back(w):
        q = qjax.quantize(w, name)
        return q.leaves, qjax.dequantize(q)

    with jax.default_device(jax.devices("cpu")[0]):
        expected = there_and_back(jnp.asarray(w))
    for run in (there_and_back, jax.jit(there_and_back)):
        jax.tree.map(np.testing.assert_array_equal, run(jax.device_put(w, gpu)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["F16", "Q4_K", "IQ4_NL", "int3_g128_mse"])
def test_training_runs_on_what_is_exported(gpu, w, name):
    x = jax.device_put(w, gpu)
    expected = qjax.dequantize(qjax.quantize(x, name))

    def step(x):
        return jax.value_and_grad(lambda w: jnp.sum(jnp.square(fake_quant(w, name) - 1)))(x)[1] / 2 + 1

    np.testing.assert_array_equal(jax.jit(lambda x: fake_quant(2 * x / 2, name))(x), expected)
    np.testing.assert_allclose(jax.jit(step)(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["F16", "Q4_1", "int4_g128", "FP8_E4M3", "NF4"])
def test_what_is_compiled_for_a_gpu_rounds_and_divides(name):
    """No rounding is dropped and no division stays the device's own but where a long one starts from it."""
    fmt = qjax.format(name)
    text = cuda_ahead.compiled(
        lambda w: fmt.decode(*fmt.unpack(fmt.pack(*fmt.encode(w)))), jax.ShapeDtypeStruct((4, 512), jnp.float32)
    ).as_text()
    divisions = re.findall(r" = f32\S* divide\(.*", text)
    assert all("jit(quotient)" in line for line in divisions), divisions
    assert "shift-right" in text


def test_round_fp16_survives_the_compiler_for_a_gpu():
    text = cuda_ahead.compiled(lambda x: round_fp16(x) + 1, jax.ShapeDtypeStruct((4, 512), jnp.float32)).as_text()
    assert "shift-right" in text and "f32[4,512]{1,0} convert(" in text
    dropped = cuda_ahead.compiled(
        lambda x: x.astype(jnp.float16).astype(jnp.float32) + 1, jax.ShapeDtypeStruct((4, 512), jnp.float32)
    ).as_text()
    assert "f16[" not in dropped  # else a compiler of today needs less care


def test_sweeps_are_not_tuned(monkeypatch):
    """The option reaches the compiler from the outermost program, and stands in no one's way within another."""
    assert UNTUNED == {"xla_gpu_autotune_level": 0} and hasattr(round_weight, "__wrapped__")
    monkeypatch.setitem(UNTUNED, "xla_no_such_option", 1)
    double = untuned(lambda x, times: times * x, static_argnames=("times",))
    x = jnp.float32(3)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        double(x, times=2)
    assert jax.jit(lambda x: double(x, times=2))(x) == 6
    assert jax.jit(lambda: double(x, times=2))() == 6
    assert jax.vmap(lambda x: double(x, times=2))(x[None])[0] == 6
    assert jax.grad(lambda x: double(x, times=2))(x) == 2


@pytest.mark.slow
def test_on_device_in_its_dry_form(tmp_path):
    root, out = Path(__file__).parents[1], tmp_path / "report.json"
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [root / "scripts/on_device.sh", "--dry", "--out", out, "encode", "kernels", "generate"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert all(report["parts"][name]["ok"] for name in ("encode", "kernels", "generate"))
    assert {row["name"] for row in report["parts"]["generate"]["rows"]} == {"float32", "packed"}
    assert report["machine"]["platform"] == "cpu" and report["dry"]
    assert "encode: ok" in done.stdout and done.stdout.rstrip().endswith("failed: none")
    missing = subprocess.run(
        [root / "scripts/on_device.sh", "--dry", "nonsense"], capture_output=True, text=True, env=environment
    )
    assert missing.returncode == 2 and "no part 'nonsense'; there are exact, tests" in missing.stderr
