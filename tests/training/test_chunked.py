"""Losses over chunks of the vocabulary: the numbers, gradients and memory that they should have."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from divergences import FOUR, NAMED, REFERENCES, differences, probabilities

from qjax.errors import UserError
from qjax.training.losses.chunked import Unread, chunked_cross_entropy, chunked_loss
from qjax.training.losses.distill import distill_loss


@pytest.fixture(params=FOUR)
def name(request):
    return request.param


def heads(rng, n, d_teacher, d_student, v):
    normal = [rng.standard_normal(shape) for shape in ((n, d_teacher), (d_teacher, v), (n, d_student), (d_student, v))]
    return [jnp.asarray(x * (1.0 if i % 2 == 0 else 0.7), jnp.float32) for i, x in enumerate(normal)]


@partial(jax.jit, static_argnums=0, static_argnames="temperature")
def full(f, x_t, w_t, x_s, w_s, mask=None, temperature=1.0):
    def loss(x_s, w_s):
        return distill_loss(x_t @ w_t, x_s @ w_s, f, mask, temperature)

    return jax.value_and_grad(loss, (0, 1))(x_s, w_s)


@partial(jax.jit, static_argnums=(0, 5), static_argnames="temperature")
def chunked(f, x_t, w_t, x_s, w_s, chunk, mask=None, temperature=1.0):
    def loss(x_s, w_s):
        return chunked_loss(f, Unread(x_t, w_t, chunk), Unread(x_s, w_s, chunk), mask, temperature)

    return jax.value_and_grad(loss, (0, 1))(x_s, w_s)


def check_gradients(grads, wanted, rtol=1e-5):
    """Within rtol, where the sum of a gradient's terms does not cancel."""
    for g, want in zip(grads, wanted, strict=True):
        assert np.abs(want).max() > 1e-3
        np.testing.assert_allclose(g, want, rtol=rtol, atol=rtol * float(np.abs(want).max()))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("chunk", [30, 32])
def test_chunks_give_the_full_loss_and_gradients(name, chunk, rng):
    problem = heads(rng, 12, 9, 6, 90)
    options = {} if chunk == 30 else {"mask": jnp.arange(12) % 5 > 0, "temperature": 2.0}
    value, grads = chunked(NAMED[name], *problem, chunk, **options)
    want, wanted = full(NAMED[name], *problem, **options)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    check_gradients(grads, wanted)


@pytest.mark.parametrize("chunk", [1, 20])
def test_the_smallest_and_a_too_large_chunk(chunk, rng):
    problem = heads(rng, 5, 4, 3, 11)
    value, grads = chunked(NAMED["fkl"], *problem, chunk)
    want, wanted = full(NAMED["fkl"], *problem)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    check_gradients(grads, wanted)


def test_chunks_of_confident_models(name, rng):
    """Logits in the hundreds, growing with the token: the running maximum must move."""
    x_t, w_t, x_s, w_s = heads(rng, 12, 9, 6, 90)
    grow = jnp.linspace(1, 60, 90)[None]
    problem = (x_t, grow * w_t, x_s, grow * w_t[:6] + w_s)
    assert jnp.abs(x_t @ problem[1]).max() > 200
    value, (g, _) = chunked(NAMED[name], *problem, 30)
    p, (x, w) = probabilities(x_t @ problem[1]), (np.asarray(a, np.float64) for a in problem[2:])
    np.testing.assert_allclose(value, REFERENCES[name](p, probabilities(x @ w)).mean(), rtol=2e-5)
    want = differences(lambda x: REFERENCES[name](p, probabilities(x @ w)).mean(), x)
    np.testing.assert_allclose(g, want, rtol=1e-3, atol=1e-4 * np.abs(want).max() + 1e-6)


def test_gradients_over_chunks_of_bfloat16_sum_in_float32(rng):
    problem = [x.astype(jnp.bfloat16) for x in heads(rng, 12, 9, 6, 900)]
    value, grads = chunked(NAMED["jsd"], *problem, 4)  # 225 chunks: their sum in bfloat16 would lose 5 % and more
    want, wanted = full(NAMED["jsd"], *(x.astype(jnp.float32) for x in problem))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for g, g_full in zip(grads, wanted, strict=True):
        assert g.dtype == jnp.bfloat16
        np.testing.assert_allclose(g.astype(jnp.float32), g_full, atol=0.01 * float(np.abs(g_full).max()))


def largest(jaxpr):
    """Elements of the largest array that a program makes anywhere, inner programs included."""
    sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars if hasattr(v.aval, "size")]
    inner = [j for e in jaxpr.eqns for j in jax.tree.leaves(list(e.params.values()), is_leaf=is_jaxpr) if is_jaxpr(j)]
    return max([0, *sizes, *(largest(getattr(j, "jaxpr", j)) for j in inner)])


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize("name", ["fkl", "jsd"])
def test_no_array_of_all_logits_exists(name):
    n, d, v, chunk = 256, 16, 8000, 100
    problem = [jnp.zeros(shape) for shape in ((n, d), (d, v), (n, d), (d, v))]
    size, temporary = {}, {}
    for way, step in {
        "chunked": lambda *p: chunked(NAMED[name], *p, chunk),
        "full": lambda *p: full(NAMED[name], *p),
    }.items():
        size[way] = largest(jax.make_jaxpr(step)(*problem).jaxpr)
        temporary[way] = jax.jit(step).lower(*problem).compile().memory_analysis().temp_size_in_bytes
    assert size["full"] >= n * v
    assert size["chunked"] <= d * v < n * v / 10
    # compiled: some chunks of logits and copies of the heads, far less than one float32 [n, v]
    assert temporary["full"] >= 4 * n * v
    assert temporary["chunked"] < 4 * n * v / 3


def capped(z, c):
    return z if c is None else c * jnp.tanh(z / c)


@pytest.mark.parametrize(("chunk", "softcap"), [(30, None), (32, 3.0), (1000, None)])
def test_cross_entropy_over_chunks(chunk, softcap, rng):
    x, w = heads(rng, 12, 9, 6, 90)[:2]
    targets = jnp.asarray(rng.integers(0, 90, 12))

    def whole(x, w):
        return optax.softmax_cross_entropy_with_integer_labels(capped(x @ w, softcap), targets).mean()

    want, wanted = jax.jit(jax.value_and_grad(whole, (0, 1)))(x, w)

    def parts(x, w):
        return chunked_cross_entropy(Unread(x, w, chunk, softcap), targets)

    value, grads = jax.jit(jax.value_and_grad(parts, (0, 1)))(x, w)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    check_gradients(grads, wanted)


def test_softcaps_of_both_models(rng):
    x_t, w_t, x_s, w_s = heads(rng, 12, 9, 6, 90)

    def whole(x, w):
        return distill_loss(capped(x_t @ w_t, 2.0), capped(x @ w, 3.0), NAMED["jsd"])

    def parts(x, w):
        return chunked_loss(NAMED["jsd"], Unread(x_t, w_t, 32, 2.0), Unread(x, w, 32, 3.0))

    want, wanted = jax.jit(jax.value_and_grad(whole, (0, 1)))(x_s, w_s)
    value, grads = jax.jit(jax.value_and_grad(parts, (0, 1)))(x_s, w_s)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    check_gradients(grads, wanted)


def test_nothing_flows_to_the_teacher(rng):
    x_t, w_t, x_s, w_s = heads(rng, 12, 9, 6, 90)

    def loss(a):
        return chunked_loss(NAMED["cakld"], Unread(*a, 8), Unread(x_s, w_s, 8))

    value, grads = jax.value_and_grad(loss)((x_t, w_t))
    assert value > 0 and all(not np.any(g) for g in grads)


def test_mistakes_are_named(rng):
    x, w = heads(rng, 4, 4, 4, 20)[:2]
    with pytest.raises(UserError, match="teacher has 20 tokens and the student 19"):
        chunked_loss(NAMED["fkl"], Unread(x, w, 8), Unread(x, w[:, :19], 8))
    with pytest.raises(UserError, match="at least 1 token"):
        Unread(x, w, 0)
