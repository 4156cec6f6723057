"""Outside of jit a lifted function is compiled once, whoever lifts it, and forgotten with the function."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lift_programs import kernel, normal

import qjax
from qjax.lifting import lift
from qjax.lifting.apply import _COMPILED


def model():
    traced = []

    def fn(p, x, times=2, flag=True):
        traced.append(x.shape)
        for _ in range(times):
            x = jax.lax.scan(lambda x, _: (jax.nn.gelu(x @ p["w"]), None), x, None, length=2)[0]
        return x if flag else -x

    return fn, {"w": kernel(0, 64, 64)}, normal(1, 5, 64), traced


def test_a_second_call_compiles_nothing():
    fn, params, x, traced = model()
    first, twice = lift(fn)(params, x), 2.0 * x
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    again = lift(fn)(params, x)
    other = lift(fn)({"w": params["w"]}, twice)
    assert [event for event in compiled if "compile" in event or "trace" in event] == [] and len(traced) == 1
    lift(lambda p, x: fn(p, x))(params, x)
    assert any("compile" in event for event in compiled)  # the listener hears another function
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_other_shapes_flags_and_structures_are_other_programs():
    fn, params, x, traced = model()
    y = lift(fn)(params, x)
    np.testing.assert_allclose(lift(fn)(params, x, flag=False), -y, rtol=1e-5)
    np.testing.assert_allclose(lift(fn)(params, x[:2]), y[:2], rtol=1e-5)
    assert not np.allclose(lift(fn)(params, x, times=1), y)
    dense = {"w": qjax.dequantize(params["w"])}
    np.testing.assert_allclose(lift(fn)(dense, x), y, rtol=1e-4, atol=1e-5)
    assert len(traced) == 5


def test_under_a_transformation_it_is_traced_there():
    fn, params, x, _ = model()
    outer = []

    @jax.jit
    def jitted(s):
        def closed(p, x):  # closes over a tracer
            return fn(p, x) * s

        outer.append(closed)
        return lift(closed)(params, x)

    np.testing.assert_allclose(jitted(2.0), 2 * lift(fn)(params, x), rtol=1e-5)
    assert [_COMPILED[id(f), True]._cache_size() for f in outer] == [0]
    grad = jax.grad(lambda s: (lift(lambda p, x: fn(p, x) * s)(params, x)).sum())(2.0)
    np.testing.assert_allclose(grad, lift(fn)(params, x).sum(), rtol=1e-4)


def test_programs_go_with_their_function():
    fn, params, x, _ = model()
    lift(fn)(params, x)
    gone, before = weakref.ref(fn), len(_COMPILED)
    del fn
    gc.collect()
    assert gone() is None and len(_COMPILED) < before


def test_one_method_lifted_twice_outlives_the_first():
    """Bound methods are equal and each an object of its own."""

    class Model:
        def apply(self, p, x):
            return x @ p["w"]

    model, params = Model(), {"w": kernel(0, 64, 32)}
    first, second = lift(model.apply), lift(model.apply)
    y = first(params, jnp.ones((2, 64)))
    del first
    gc.collect()
    np.testing.assert_allclose(second(params, jnp.ones((3, 64)))[:2], y, rtol=1e-5)


def test_what_cannot_be_hashed_runs_all_the_same():
    class Apply:
        __hash__ = None

        def __call__(self, p, x, mode):
            return x @ p["w"] * len(mode)

    params, x = {"w": kernel(0, 64, 32)}, jnp.ones((2, 64))
    np.testing.assert_allclose(lift(Apply())(params, x, {1, 2}), 2 * qjax.dot(x, params["w"]), rtol=1e-5)
    with pytest.raises(qjax.errors.UserError, match="'w'"):
        lift(lambda p, x: p["w"].sum())(params, x)
