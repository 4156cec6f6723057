"""What is stored is rounded and divided alike in every program and on every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jaxprs import equations

from qjax.formats import format, format_names
from qjax.formats.storage import fp16_bits, long_division, quotient, reciprocal
from qjax.reparam.inputs import RoundedInput

TINY = np.finfo(np.float32).tiny


def test_fp16_is_rounded_as_ieee_says():
    """Every fp16, the middles between two, their neighbours in float32, and any bits, signs and infinities included."""
    half = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    half[-1] = 65536.0
    middle = (half[1:] + half[:-1]) / 2
    edges = np.concatenate([half, *(np.nextafter(middle, to).astype(np.float32) for to in (0, np.inf)), middle])
    bits = np.random.default_rng(0).integers(0, 2**32, 2**18, dtype=np.uint32).view(np.float32)
    x = np.concatenate([edges, -edges, bits[~np.isnan(bits)], [np.inf, -np.inf, 0.0, -0.0]]).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(jax.jit(fp16_bits)(x), expected)
    nan = jnp.array([np.nan, -np.nan], jnp.float32)
    assert np.isnan(np.asarray(fp16_bits(nan)).view(np.float16)).all()


@pytest.mark.parametrize("off", [-3, 0, 3])
def test_quotients_from_a_poor_guess(off):
    """Away from the CPU: right to the last bit from a guess three units off, for any bits and for hard mantissas."""
    rng = np.random.default_rng(off + 3)
    a, b = rng.integers(0, 2**32, (2, 2**16), dtype=np.uint32)
    ends = np.array([0, 1, 2, 3, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFD, 0x7FFFFE, 0x7FFFFF], np.uint32) | 0x3F800000
    most = rng.integers(0, 2**23, 2**10, dtype=np.uint32) | 0x3F800000
    hard = np.stack(np.meshgrid(np.concatenate([ends, most]), np.concatenate([ends, most[:64]]))).reshape(2, -1)
    edges = np.array([0.0, -0.0, 1.0, -3.0, np.inf, -np.inf, np.nan, TINY, 3e38], np.float32).view(np.uint32)
    edge = np.stack(np.meshgrid(edges, edges)).reshape(2, -1)
    a, b = np.concatenate([np.stack([a, b]), hard, edge], axis=1)

    @jax.jit
    def divided(a, b):
        m, n = ((v & 0x7FFFFF) | 0x800000 for v in (a, b))
        guess = lax.bitcast_convert_type(m.astype(jnp.float32) / n.astype(jnp.float32), jnp.int32) + off
        return long_division(a, b, m, n, lax.bitcast_convert_type(guess, jnp.float32))

    x, y = a.view(np.float32), b.view(np.float32)
    normal = ~((x != 0) & (abs(x) < TINY) | (y != 0) & (abs(y) < TINY))
    with np.errstate(all="ignore"):
        expected = (x / y)[normal]
    expected[abs(expected) < TINY] *= 0  # what XLA's programs do with them on the CPU
    got = np.asarray(divided(a.view(np.int32), b.view(np.int32)))[normal]
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got) | np.isnan(got), np.signbit(expected) | np.isnan(expected))


def test_quotients_on_the_cpu_and_elsewhere(rng):
    """One division on the CPU, however it is compiled; on a GPU the long one."""
    x, y = jnp.asarray(rng.standard_normal((2, 64, 32)), jnp.float32)
    for run in (quotient, jax.jit(quotient), jax.vmap(quotient)):
        np.testing.assert_array_equal(run(x, y), np.asarray(x) / np.asarray(y))
    y = y[:, :1]
    np.testing.assert_array_equal(jax.jit(quotient)(x, y), np.asarray(x) / np.asarray(y))
    np.testing.assert_array_equal(reciprocal(jnp.float32([0, 3])), np.float32([0, 1 / np.float32(3)]))
    lowered = {on: jax.jit(quotient).trace(x, y).lower(lowering_platforms=(on,)).as_text() for on in ("cpu", "cuda")}
    assert "shift" not in lowered["cpu"] and lowered["cuda"].count("shift") > 4


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", format_names())
def test_no_cast_a_compiler_drops_and_no_division_it_changes(name):
    """XLA:GPU drops f32 -> f16 -> f32, and its division is not IEEE's: neither may lie before a code or a scale."""
    fmt = format(name)
    w = jnp.ones((max(2, fmt.rows), max(256, fmt.block)), jnp.float32)
    searched = "_mse" in name or name.endswith("_K") or name.startswith("IQ4")  # sums decide there, in any order
    jaxpr = jax.make_jaxpr(lambda w: fmt.decode(*fmt.encode(w)))(w)
    for eqn in equations(jaxpr, but=("quotient",)):
        if eqn.primitive.name == "convert_element_type":
            wide, narrow = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
            assert not (wide == jnp.float32 and narrow in (jnp.float16, jnp.bfloat16)), eqn
        if eqn.primitive.name == "div" and not searched:
            assert eqn.outvars[0].aval.dtype != jnp.float32, eqn


@pytest.mark.parametrize("kind", ["int8", "int4", "e4m3", "e5m2"])
def test_inputs_are_rounded_alike_in_every_program(kind, rng):
    x = rng.standard_normal((64, 96)).astype(np.float32)
    rounded = RoundedInput(None, kind)
    codes, s, _ = rounded.parts(jnp.asarray(x))
    np.testing.assert_array_equal(
        s, abs(x).max(axis=1, keepdims=True) / np.float32({"int8": 127, "int4": 7, "e4m3": 448, "e5m2": 57344}[kind])
    )
    again = jax.jit(lambda x: rounded.parts(x)[0])(x)
    np.testing.assert_array_equal(np.asarray(codes).astype(np.float32), np.asarray(again).astype(np.float32))
    if kind in ("int8", "int4"):
        np.testing.assert_array_equal(codes, np.round(x / np.asarray(s)))
    for eqn in equations(jax.make_jaxpr(lambda x: rounded.input(x))(x), but=("quotient",)):
        assert eqn.primitive.name != "div", eqn
