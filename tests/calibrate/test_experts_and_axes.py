"""Statistics belong to one matrix of a stack and to one axis of a leaf: by hand, or refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate import load_stats, observe, save_stats
from qjax.errors import UserError
from qjax.plan import Plan, Rule

E, N, OUT, T = 3, 8, 4, 40
KINDS = ("H", "h", "absmean", "absmax", "samples")


def experts(rng, *lead):
    return {"w": jnp.asarray(rng.standard_normal((*lead, N, OUT)), jnp.float32)}


def tokens(rng, *lead):
    return jnp.asarray(rng.standard_normal((*lead, N)), jnp.float32)


def check(stats, seen):
    """`seen` [m, n] of one matrix, by hand."""
    seen = np.asarray(seen, np.float64).reshape(-1, seen.shape[-1])
    assert float(stats.count) == len(seen)
    np.testing.assert_allclose(stats.H, seen.T @ seen / len(seen), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats.h, (seen**2).mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats.absmean, np.abs(seen).mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats.absmax, np.abs(seen).max(0), rtol=1e-5)
    np.testing.assert_allclose(
        np.sort(np.asarray(stats.samples)[: len(seen)].sum(1)), np.sort(seen.sum(1)), rtol=1e-4, atol=1e-5
    )


def check_experts(stats, x, chosen):
    """Token by token: x [t, n] goes to the experts chosen [t] or [t, k]."""
    x, chosen = np.asarray(x), np.asarray(chosen).reshape(len(x), -1)
    for e in range(E):
        check(jax.tree.map(lambda a, e=e: a[e], stats), x[(chosen == e).any(1)])


PICKS = {
    "one": lambda p, x, e: jnp.einsum("ti,tio->to", x, p["w"][e]),
    "vmap": lambda p, x, e: jax.vmap(lambda x, e: x @ p["w"][e])(x, e),
    "take": lambda p, x, e: jnp.einsum("tio,ti->ot", jnp.take(p["w"], e, axis=0, mode="clip"), x),
    "transposed": lambda p, x, e: jnp.einsum("ti,tio->to", x, jnp.take(p["w"].transpose(1, 0, 2), e, 1).swapaxes(0, 1)),
    "one_by_one": lambda p, x, e: jax.lax.map(lambda xe: xe[0] @ p["w"][xe[1]], (x, e)),
    "inside_jit": lambda p, x, e: jax.jit(lambda w, x, e: jnp.einsum("ti,tio->to", x, w[e]))(p["w"], x, e),
    "reshaped": lambda p, x, e: jnp.einsum("abi,abio->abo", x.reshape(4, T // 4, N), p["w"][e.reshape(4, T // 4)]),
}


@pytest.mark.parametrize("pick", PICKS)
def test_gathered_experts_have_the_sums_of_their_own_tokens(rng, pick):
    params, x, chosen = experts(rng, E), tokens(rng, T), jnp.asarray(rng.integers(0, E, T))
    stats = observe(PICKS[pick], params, [(x, chosen)], KINDS)["w"]
    assert stats.H.shape == (E, N, N) and stats.axis == -2
    check_experts(stats, x, chosen)


@pytest.mark.parametrize("own_inputs", [False, True])
def test_two_experts_for_each_token(rng, own_inputs):
    """The index has an axis of its own, or one that it shares with the activation, contracted at once or not."""
    params, chosen = experts(rng, E), jnp.asarray(np.stack([rng.permutation(E)[:2] for _ in range(T)]))
    x = tokens(rng, T, 2) if own_inputs else tokens(rng, T)
    spec = "tki,tkio->to" if own_inputs else "ti,tkio->tko"
    stats = observe(lambda p, x, e: jnp.einsum(spec, x, p["w"][e]), params, [(x, chosen)], KINDS)["w"]
    if own_inputs:
        check_experts(stats, x.reshape(2 * T, N), chosen.reshape(2 * T))
    else:
        check_experts(stats, x, chosen)


def test_layers_that_are_indexed_have_their_own_sums(rng):
    """In Python loops, in a fori_loop, and picked from a stack of two axes."""
    params, x = {"w": jnp.asarray(rng.standard_normal((E, N, N)) / 3, jnp.float32)}, tokens(rng, T)

    def unrolled(p, x):
        for i in range(E):
            x = jnp.tanh(x @ p["w"][i])
        return x

    def split(p, x):
        for w in jnp.split(p["w"], E):
            x = jnp.tanh(x @ w[0])
        return x

    def unstacked(p, x):
        for w in jnp.unstack(p["w"]):
            x = jnp.tanh(x @ w)
        return x

    def looped(p, x):
        return jax.lax.fori_loop(0, E, lambda i, x: jnp.tanh(x @ p["w"][i]), x)

    seen = [x]
    for i in range(E):
        seen.append(jnp.tanh(seen[-1] @ params["w"][i]))
    for apply in (unrolled, looped, split, unstacked):
        stats = observe(apply, params, [x], KINDS)["w"]
        for i in range(E):
            check(jax.tree.map(lambda a, i=i: a[i], stats), seen[i])
    nested, chosen = experts(rng, 2, E), jnp.asarray(rng.integers(0, E, T))
    two = observe(
        lambda p, x, e: sum(jnp.einsum("ti,tio->to", (1.0 + i) * x, p["w"][i, e]) for i in range(2)),
        nested, [(x, chosen)], KINDS,
    )["w"]  # fmt: skip
    assert two.H.shape == (2, E, N, N)
    for i in range(2):
        check_experts(jax.tree.map(lambda a, i=i: a[i], two), (1.0 + i) * x, chosen)


def test_parts_of_a_stack_are_refused_by_name(rng):
    params, x, chosen = experts(rng, E), tokens(rng, T), jnp.asarray(rng.integers(0, 2, T))
    with pytest.raises(UserError, match=r"'w' \[3, 8, 4\]: dot_general takes entries .* cannot be followed"):
        observe(lambda p, x, e: jnp.einsum("ti,tio->to", x, p["w"][1:][e]), params, [(x, chosen)])
    with pytest.raises(UserError, match=r"'w' .*takes entries of its stack, and which cannot be followed"):
        observe(lambda p, x, e: jax.lax.map(lambda xw: xw[0] @ xw[1], (x, p["w"][e])), params, [(x, chosen)])
    with pytest.raises(UserError, match=r"w: dot_general reads a part of its stack of \[3\]"):
        observe(lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"][1:]), params, [tokens(rng, 2, T)])
    late = {"w": jnp.asarray(rng.standard_normal((N, OUT, E)), jnp.float32)}
    with pytest.raises(UserError, match=r"w: dot_general reads matrices .* stacked on axes \[-1\]"):
        observe(lambda p, x: jnp.einsum("eti,ioe->eto", x, p["w"]), late, [tokens(rng, E, T)])


def test_each_expert_is_rounded_in_its_own_statistics(rng):
    params = {"w": jnp.asarray(rng.standard_normal((E, 64, 32)), jnp.float32)}
    mix = jnp.asarray(rng.standard_normal((E, 64, 64)), jnp.float32)
    chosen = jnp.asarray(rng.integers(0, E, 400))
    x = jnp.einsum("ti,tij->tj", jnp.asarray(rng.standard_normal((400, 64)), jnp.float32), mix[chosen])
    apply = PICKS["one"]
    q, _ = qjax.quantize_params(params, "Q4_0", observe(apply, params, [(x, chosen)]), recipe="gptq")
    for e in range(E):
        seen = np.asarray(x[chosen == e], np.float64)
        mine = qjax.Stats(H=jnp.asarray(seen.T @ seen / len(seen), jnp.float32), count=jnp.float32(len(seen)))
        alone, _ = qjax.quantize_params({"w": params["w"][e]}, "Q4_0", {"w": mine}, recipe="gptq")
        same = np.mean(np.asarray(qjax.dequantize(q["w"])[e]) == np.asarray(qjax.dequantize(alone["w"])))
        assert same > 0.99


def square(rng):
    """A square weight stored (out, in), which its name does not say, and uneven inputs."""
    params = {"dense": {"kernel": jnp.asarray(rng.standard_normal((128, 128)), jnp.float32)}}
    x = jnp.asarray(rng.standard_normal((512, 128)) * np.geomspace(0.01, 10, 128), jnp.float32)
    return params, x


def error(apply, params, q, x):
    dense = jax.tree.map(lambda w: qjax.dequantize(w), q, is_leaf=qjax.is_qtensor)
    y = apply(params, x)
    return float(jnp.linalg.norm(apply(dense, x) - y) / jnp.linalg.norm(y))


def test_the_axis_of_a_square_weight_comes_from_the_trace(rng):
    def rows(p, x):
        return x @ p["dense"]["kernel"].T

    params, x = square(rng)
    stats = observe(rows, params, [x])
    assert stats["dense/kernel"].axis == -1
    by_stats, _ = qjax.quantize_params(params, "Q4_0", stats, recipe="gptq")
    by_apply, _ = qjax.quantize_params(params, "Q4_0", apply=rows, inputs=(x,))
    assert by_stats["dense"]["kernel"].axis == by_apply["dense"]["kernel"].axis == -1
    blind = {"dense/kernel": qjax.Stats(H=stats["dense/kernel"].H, count=stats["dense/kernel"].count)}
    by_name, _ = qjax.quantize_params(params, "Q4_0", blind, recipe="gptq")
    assert error(rows, params, by_stats, x) < 0.5 * error(rows, params, by_name, x)
    assert qjax.lift(rows)(by_stats, x).shape == (512, 128)
    with pytest.raises(UserError, match=r"dense/kernel.*axis -1, and it is to be rounded along axis -2"):
        qjax.quantize_params(params, "Q4_0", stats, recipe="gptq", axes={"dense/kernel": -2})


def test_a_leaf_contracted_along_two_axes_has_the_sums_of_one(rng):
    def both(p, x):
        return jnp.tanh(x @ p["w"]) @ p["w"].T

    params = {"w": jnp.asarray(rng.standard_normal((64, 64)) / 8, jnp.float32)}
    x = jnp.asarray(rng.standard_normal((T, 64)), jnp.float32)
    stats = observe(both, params, [x])
    assert (stats["w"].axis, stats["w"].also) == (-2, (-1,))
    np.testing.assert_allclose(stats["w"].H, x.T @ x / T, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="w: is contracted along axis -2 and along -1"):
        qjax.quantize_params(params, "Q4_0", stats, recipe="gptq")
    with pytest.raises(UserError, match=r"w.*with axis -2, and it is to be rounded along axis -1"):
        qjax.quantize_params(params, "Q4_0", stats, recipe="gptq", axes={"w": -1})
    assert qjax.quantize_params(params, "Q4_0", stats, recipe="gptq", axes={"w": -2})[0]["w"].axis == -2
    kept, _ = qjax.quantize_params(params, Plan((Rule("w", "keep"),)), stats)
    assert kept["w"] is params["w"]


def test_axes_are_saved_and_old_files_have_none(rng, tmp_path):
    params, x = {"w": jnp.asarray(rng.standard_normal((N, N)), jnp.float32)}, tokens(rng, T)
    stats = observe(lambda p, x: jnp.tanh(x @ p["w"].T) @ p["w"], params, [x])
    save_stats(tmp_path / "stats.npz", stats)
    back = load_stats(tmp_path / "stats.npz")["w"]
    assert (back.axis, back.also) == (-1, (-2,)) and back.along(-1, "w") is back
    with np.load(tmp_path / "stats.npz") as f:
        np.savez(tmp_path / "old.npz", **{k: v for k, v in f.items() if k != "axes"})
    old = load_stats(tmp_path / "old.npz")["w"]
    assert old.axis is None and old.along(-2, "w") is old
    np.testing.assert_array_equal(old.H, back.H)
