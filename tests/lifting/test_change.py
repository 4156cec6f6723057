"""`substitute`, `adapt` and `tap` against explicit computation."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from lift_programs import TOKENS, assert_close, decoder, dense_params, kernel, normal, stacked_kernel

import qjax
from qjax.errors import UserError
from qjax.lifting import adapt, replace_inputs, report, substitute, tap, tap_shapes, watch


@jax.custom_vjp
def ste(w):
    return qjax.dequantize(qjax.quantize(w, "Q4_0", axis=0))


ste.defvjp(lambda w: (ste(w), None), lambda _, g: (g,))


@partial(jax.tree_util.register_dataclass, data_fields=("a", "b", "scale"), meta_fields=())
@dataclasses.dataclass
class Adapter:
    a: Any
    b: Any
    scale: Any


def loss(y):
    return jnp.sum(jnp.sin(y))


# --- substitute ----------------------------------------------------------------------------------------------------


def test_fake_quantization_has_straight_through_gradients():
    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"] + p["b"][None]

    params, x = {"w": normal(0, 32, 32), "v": normal(1, 32, 4), "b": normal(2, 4)}, normal(9, 5, 32)
    fake = substitute(fn, lambda use, w: ste(w))
    rounded = params | {k: ste(params[k]) for k in "wv"}
    assert_close(fake(params, x), fn(rounded, x))
    grads = jax.grad(lambda p: loss(fake(p, x)))(params)
    assert_close(grads, jax.grad(lambda p: loss(fn(p, x)))(rounded))


@pytest.mark.slow
def test_fake_quantization_of_the_decoder():
    apply, params = decoder(layers=1, tied=False)
    calls = []

    def transform(use, w):
        calls.append(use.path)
        return ste(w) if use.kind == "dot" else w

    fake = substitute(apply, transform)
    rounded = jax.tree_util.tree_map_with_path(lambda path, w: ste(w) if "kernel" in str(path) else w, params)
    got = jax.jit(jax.value_and_grad(lambda p: loss(fake(p, TOKENS))))(params)
    assert len(calls) == len(set(calls)) == 9  # embedding, 7 kernels, head
    want = jax.jit(jax.value_and_grad(lambda p: loss(apply(p, TOKENS))))(rounded)
    assert_close(got, want, rtol=1e-4)  # straight through


def test_a_tied_embedding_is_transformed_once():
    apply, params = decoder(layers=1)
    calls = []
    fake = substitute(apply, lambda use, w: calls.append(use.key) or w * 0.5)
    halved = jax.tree.map(lambda w: w * 0.5 if w.ndim > 1 else w, params)
    assert_close(jax.jit(fake)(params, TOKENS), jax.jit(apply)(halved, TOKENS))
    assert calls.count("embed/embedding") == 1 and len(calls) == len(set(calls)) == 8


def test_a_leaf_contracted_along_two_axes_has_two_values():
    """An autoencoder with tied weights: x W, then h W^T; each product sees its own W'."""

    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    params, x = {"w": normal(0, 32, 16)}, normal(1, 5, 32)
    fake = substitute(fn, lambda use, w: w * (2.0 if use.axis == -2 else 3.0))
    assert_close(fake(params, x), jnp.tanh(x @ params["w"] * 2.0) @ params["w"].T * 3.0)


def test_substitution_under_scan_sees_the_stack():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    params, x = {"w": normal(0, 3, 32, 32)}, normal(1, 5, 32)
    shapes = []
    fake = substitute(fn, lambda use, w: shapes.append((w.shape, use.stacked)) or w * 0.5)
    assert_close(fake(params, x), fn({"w": params["w"] * 0.5}, x))
    assert shapes == [((3, 32, 32), (3,))]


def test_substitution_of_another_shape_is_an_error():
    fake = substitute(lambda p, x: x @ p["w"], lambda use, w: w[:1])
    with pytest.raises(UserError, match="'w'"):
        fake({"w": normal(0, 4, 4)}, normal(1, 2, 4))


# --- adapt ---------------------------------------------------------------------------------------------------------


def adapter(seed, n, r, *out, lead=(), scale=0.5):
    return Adapter(normal(seed, *lead, n, r), normal(seed + 1, *lead, r, *out), scale)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("packed", [False, True])
def test_adapter_equals_merged_weight(packed):
    def fn(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"].T

    params = {"w": kernel(0, 64, 32), "v": normal(1, 8, 32)}
    params = params if packed else dense_params(params)
    adapters, x = {"w": adapter(2, 64, 3, 32), "v": adapter(4, 32, 2, 8)}, normal(9, 5, 64)
    dense = dense_params(params)
    merged = {
        "w": dense["w"] + 0.5 * adapters["w"].a @ adapters["w"].b,
        "v": dense["v"] + (0.5 * adapters["v"].a @ adapters["v"].b).T,
    }
    assert_close(adapt(fn)(params, adapters, x), fn(merged, x), rtol=1e-4)
    grads = jax.grad(lambda adapters: loss(adapt(fn)(params, adapters, x)))(adapters)

    def by_merged(adapters):
        merged = {"w": dense["w"] + adapters["w"].scale * adapters["w"].a @ adapters["w"].b, "v": dense["v"]}
        merged["v"] += (adapters["v"].scale * adapters["v"].a @ adapters["v"].b).T
        return loss(fn(merged, x))

    assert_close(grads, jax.grad(by_merged)(adapters), rtol=1e-3)


@pytest.mark.parametrize("scale", [0.5, jnp.array([0.5, 1.0, 2.0])])
def test_adapters_under_scan_are_stacked(scale):
    def fn(p, x):
        return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["w"])[0]

    params, x = {"w": stacked_kernel(0, 3, 64, 64)}, normal(1, 5, 64)
    a = adapter(2, 64, 2, 64, lead=(3,), scale=scale)
    merged = dense_params(params)["w"] + jnp.broadcast_to(scale, (3,))[:, None, None] * a.a @ a.b
    assert_close(jax.jit(adapt(fn))(params, {"w": a}, x), fn({"w": merged}, x), rtol=1e-4)


def test_adapter_of_a_weight_that_all_steps_share():
    def fn(p, xs):
        return lax.scan(lambda c, x: (jnp.tanh(c + x @ p["w"]), None), jnp.zeros((5, 64)), xs)[0]

    params, xs, a = {"w": kernel(0, 64, 64)}, normal(1, 3, 5, 64), adapter(2, 64, 2, 64)
    merged = dense_params(params)["w"] + 0.5 * a.a @ a.b
    assert_close(adapt(fn)(params, {"w": a}, xs), fn({"w": merged}, xs), rtol=1e-4)


def test_adapters_of_heads_and_experts():
    def fn(p, x):
        y = jnp.einsum("ti,ihd->thd", x, p["heads"])
        return jnp.einsum("eio,tei->eto", p["experts"], y)

    params = {"heads": normal(0, 16, 4, 8), "experts": normal(1, 4, 8, 3)}
    adapters, x = {"heads": adapter(2, 16, 2, 4, 8), "experts": adapter(4, 8, 2, 3, lead=(4,))}, normal(9, 5, 16)
    merged = {
        "heads": params["heads"] + 0.5 * jnp.tensordot(adapters["heads"].a, adapters["heads"].b, 1),
        "experts": params["experts"] + 0.5 * adapters["experts"].a @ adapters["experts"].b,
    }
    assert_close(adapt(fn)(params, adapters, x), fn(merged, x), rtol=1e-4)


def test_adapters_that_do_not_fit_are_errors():
    params, x = {"w": normal(0, 8, 4), "e": normal(1, 10, 8), "s": normal(2, 8)}, jnp.array([1, 2])

    def fn(p, i):
        return (p["e"][i] + p["s"][None]) @ p["w"]

    with pytest.raises(UserError, match=r"'e'.*'gather'"):
        adapt(fn)(params, {"e": adapter(3, 8, 2, 10)}, x)
    with pytest.raises(UserError, match=r"'q/kernel'.*no weight"):
        adapt(fn)(params, {"q/kernel": adapter(3, 8, 2, 4)}, x)
    with pytest.raises(UserError, match=r"'w' has a \(7, 2\)"):
        adapt(fn)(params, {"w": adapter(3, 7, 2, 4)}, x)


# --- tap -----------------------------------------------------------------------------------------------------------


def zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def test_tap_gradients_equal_explicit_ones():
    """y = tanh(E[i] W) W_2: the gradients by the lookup, by E[i] W and by the output, by hand."""

    def fn(p, i):
        return jnp.tanh(p["e"][i] @ p["w"]) @ p["v"]

    params, i = {"e": normal(0, 10, 8), "w": normal(1, 8, 6), "v": normal(2, 6, 4)}, jnp.array([3, 3, 9])
    shapes = tap_shapes(fn, params, i)
    assert {k: (s.shape, s.dtype) for k, s in shapes.items()} == {
        "e": ((3, 8), jnp.float32), "w": ((3, 6), jnp.float32), "v": ((3, 4), jnp.float32)
    }  # fmt: skip
    taps = zeros(shapes)
    assert_close(tap(fn)(params, taps, i), fn(params, i))
    grads = jax.jit(jax.grad(lambda taps: loss(tap(fn)(params, taps, i))))(taps)
    h = jnp.tanh(params["e"][i] @ params["w"])
    g_v = jnp.cos(h @ params["v"])
    g_w = (g_v @ params["v"].T) * (1 - h**2)
    assert_close(grads, {"e": g_w @ params["w"].T, "w": g_w, "v": g_v})
    only = jax.grad(lambda t: loss(tap(fn)(params, {"w": t, "v": None}, i)))(taps["w"])
    assert_close(only, g_w)


def test_taps_give_weight_gradients_of_the_decoder():
    """dL/dW = x^T dL/dy, for every kernel, with dL/dy from the taps; and the tied embedding has two taps."""
    apply, params = decoder(layers=1)
    shapes = tap_shapes(apply, params, TOKENS)
    assert [k for k in shapes if "embed" in k] == ["embed/embedding", "embed/embedding#1"]
    assert len(shapes) == 9

    grads, by_taps = jax.jit(jax.grad(lambda p, t: loss(tap(apply)(p, t, TOKENS)), argnums=(0, 1)))(
        params, zeros(shapes)
    )
    assert_close(grads, jax.jit(jax.grad(lambda p: loss(apply(p, TOKENS))))(params), rtol=1e-4)

    _, inputs = jax.jit(watch(apply, lambda use, x: x))(params, TOKENS)
    for use in report(apply, params, TOKENS):
        if use.kind == "dot" and "kernel" in use.path:
            x, g = inputs[use.source], by_taps[use.key]
            want = grads
            for part in use.path.split("/"):
                want = want[part]
            assert_close(jnp.einsum("bti,bto->io", x, g), want, rtol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_taps_under_scan_are_stacked(packed):
    def fn(p, x):
        return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["w"])[0]

    params, x = {"w": stacked_kernel(0, 3, 64, 64)}, normal(1, 5, 64)
    dense = dense_params(params)
    params = params if packed else dense
    shapes = tap_shapes(fn, params, x)
    assert shapes["w"].shape == (3, 5, 64)
    grads = jax.jit(jax.grad(lambda t: loss(tap(fn)(params, t, x))))(zeros(shapes))

    def by_hand(taps):
        y = x
        for w, t in zip(dense["w"], taps["w"], strict=True):
            y = jnp.tanh(y @ w + t)
        return loss(y)

    assert_close(grads, jax.grad(by_hand)(zeros(shapes)), rtol=1e-4)


def test_taps_of_a_shared_weight_are_per_step_and_in_branches_too():
    def fn(p, xs):
        def step(c, x):
            return c + lax.cond(x.sum() > 0, lambda x: jnp.sin(x @ p["w"]), lambda x: x @ p["w"], x), None

        return lax.scan(step, jnp.zeros((4,)), xs)[0]

    params, xs = {"w": normal(0, 8, 4)}, normal(1, 3, 8)
    shapes = tap_shapes(fn, params, xs)
    assert {k: s.shape for k, s in shapes.items()} == {"w": (3, 4), "w#1": (3, 4)}
    grads = jax.grad(lambda t: tap(fn)(params, t, xs).sum())(zeros(shapes))
    positive = np.asarray(xs.sum(1) > 0)[:, None]
    assert positive.any() and not positive.all()
    both = {k: np.asarray(v) for k, v in grads.items()}
    np.testing.assert_allclose(sum(np.abs(v) > 0 for v in both.values()), 1)  # each step went through one branch
    sine = next(v for v in both.values() if not set(np.unique(v)) <= {0.0, 1.0})
    np.testing.assert_allclose(sine, np.where(positive, np.cos(xs @ params["w"]), 0), rtol=1e-4)


def test_taps_that_do_not_fit_are_errors():
    def fn(p, x):
        return x @ p["w"]

    params, x = {"w": normal(0, 8, 4)}, normal(1, 5, 8)
    with pytest.raises(UserError, match=r"'v'.*w"):
        tap(fn)(params, {"v": jnp.zeros((5, 4))}, x)
    with pytest.raises(UserError, match=r"'w' has shape \(5, 1\)"):
        tap(fn)(params, {"w": jnp.zeros((5, 1))}, x)

    def loop(p, x):
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))[1]

    square = {"w": normal(0, 8, 8)}
    assert tap_shapes(loop, square, x) == {}
    with pytest.raises(UserError, match="'w'"):
        tap(loop)(square, {"w": jnp.zeros((5, 8))}, x)


def test_bf16_taps_have_the_type_of_their_output():
    apply, params = decoder(jnp.bfloat16, layers=1)
    shapes = tap_shapes(apply, params, TOKENS)
    assert {s.dtype for s in shapes.values()} == {jnp.dtype(jnp.bfloat16)}
    grads = jax.jit(jax.grad(lambda t: loss(tap(apply)(params, t, TOKENS))))(zeros(shapes))
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_replaced_inputs_in_every_arrangement():
    """Each dot reads the replacement, whatever the order of its operands and axes; lookups are left alone."""
    rng = np.random.default_rng(0)
    p = {
        "a": jnp.asarray(rng.standard_normal((6, 4)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal((3, 4, 4)), jnp.float32),
        "c": jnp.asarray(rng.standard_normal((2, 4, 5)), jnp.float32),
        "e": jnp.asarray(rng.standard_normal((7, 6)), jnp.float32),
    }
    tokens = jnp.array([[1, 5, 2]])

    def fn(p, tokens, half=lambda path, x: x):
        x = p["e"][tokens]  # [1, 3, 6]
        x = jnp.einsum("io,bti->obt", p["a"], half("a", x)).transpose(1, 2, 0)  # the weight first
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(half("b", x) @ w), None), x, p["b"])
        x = x.reshape(1, 3, 2, 2)
        w = p["c"].reshape(2, 2, 2, 5)[0]
        return jnp.einsum("bthd,hdo->bto", half("c", x), w)

    seen = []

    def halved(use, x):
        seen.append((use.path, x.shape[-1]))
        return 0.5 * x

    got = replace_inputs(fn, halved)(p, tokens)
    shown = {path for path, _ in seen}
    np.testing.assert_allclose(
        got, fn(p, tokens, lambda path, x: 0.5 * x if path in shown else x), rtol=1e-5, atol=1e-6
    )
    assert {("a", 6), ("b", 4)} <= set(seen) and "e" not in shown
    with pytest.raises(UserError, match="of the input of 'a'"):
        replace_inputs(fn, lambda use, x: x[..., :1])(p, tokens)
