"""The proximal maps against brute force in float64, and what `parq` makes of an optimizer, at both ends and between."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax.errors import UserError
from qjax.training.optim.groups import Group, partitioned
from qjax.training.optim.parq import between, inverse_slope, latent, parq, piecewise_affine, relaxed

LEVELS = np.array([-1.5, -0.4, 0.3, 1.0, 2.2])
RHOS = [0.9, 0.5, 0.1]
ONE, ZERO = jnp.float32(1.0), jnp.float32(0.0)


def f32(x):
    return jnp.asarray(np.asarray(x), jnp.float32)


def int2(w):
    return qjax.dequantize(qjax.quantize(w, "uint2_g64", axis=-2))


def cell(u, levels):
    """The nearest level and half the distance to the next one on u's side, 0 beyond the ends; levels [..., K]."""
    levels = np.sort(levels, axis=-1)
    low = np.max(np.where(levels <= u[..., None], levels, -np.inf), axis=-1)
    high = np.min(np.where(levels > u[..., None], levels, np.inf), axis=-1)
    h = np.where(np.isfinite(low) & np.isfinite(high), (high - low) / 2, 0.0)
    return np.where(u - low <= high - u, low, high), h, low, high


def clipped(u, levels, rho):
    """prox_rho as the paper writes it inside of the range of the levels; outside as the module says."""
    w_hat, h, low, high = cell(u, levels)
    c = np.where(h > 0, (low + high) / 2, 0.0)
    return np.where(h > 0, np.clip(c + (u - c) / rho, low, high), w_hat + rho * (u - w_hat))


def slowly_drawn(u, rho):
    w_hat, h, _, _ = cell(np.asarray(u, np.float64), LEVELS)
    return np.asarray(between(f32(u), f32(w_hat), f32(h), jnp.float32(rho)))


@pytest.mark.parametrize("rho", RHOS)
def test_map_between_levels(rho):
    u = np.linspace(-3, 4, 20001)
    w = slowly_drawn(u, rho)
    np.testing.assert_allclose(w, clipped(u, LEVELS, rho), atol=2e-6)
    jumps = np.diff(w)
    assert np.all(jumps > -1e-6), "not monotone"
    assert np.max(jumps) < 1.01 * (u[1] - u[0]) / rho + 2e-6, "not continuous, or steeper than 1 / rho"
    on_grid = np.mean(np.min(np.abs(w[:, None] - LEVELS), axis=1) < 1e-6)
    assert on_grid > (1 - rho) * 0.4  # the flats, of the 3.7 of 7 that lie between the levels


@pytest.mark.parametrize("rho", RHOS)
def test_map_is_the_proximal_map_of_the_bumps(rho):
    w = np.linspace(-3, 4, 14001)
    _, h, low, high = cell(w, LEVELS)
    with np.errstate(invalid="ignore"):
        bump = (1 - rho) / 2 * (w - low) * (high - w)
    beyond = np.where(w < LEVELS[0], w - LEVELS[0], w - LEVELS[-1])
    phi = np.where(h > 0, bump, (1 / rho - 1) / 2 * beyond**2)
    u = np.random.default_rng(0).uniform(-2.5, 3.2, size=300)
    brute = np.array([w[np.argmin((w - x) ** 2 / 2 + phi)] for x in u])
    np.testing.assert_allclose(slowly_drawn(u, rho), brute, atol=6e-4)  # the steps of w are 5e-4


def test_map_at_its_ends_is_exact(rng):
    u = f32(rng.normal(size=1000))
    w_hat, h, _, _ = (f32(x) for x in cell(np.asarray(u, np.float64), LEVELS))
    for fn in (between, jax.jit(between)):
        np.testing.assert_array_equal(fn(u, w_hat, h, ONE), u)
        np.testing.assert_array_equal(fn(u, w_hat, h, ZERO), w_hat)
    close = between(u, w_hat, h, jnp.float32(1 - 1e-5))
    assert float(jnp.max(jnp.abs(close - u))) < 1e-4  # no jump as the drawing sets in
    _, _, low, high = cell(np.asarray(u, np.float64), LEVELS)
    inside = np.isfinite(low) & np.isfinite(high)
    both = [between(u[inside], f32(level[inside]), h[inside], jnp.float32(0.3)) for level in (low, high)]
    np.testing.assert_allclose(*both, atol=1e-6)  # an encoder that misses the nearest level changes nothing
    steep = between(u, w_hat, h, jnp.float32(1e-9))
    np.testing.assert_allclose(steep, w_hat, atol=1e-6)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "codes", "axis", "shape"),
    [
        ("int4_g32", range(-8, 8), -2, (64, 5)),
        ("uint2_g64", range(4), -1, (3, 128)),  # an offset
        ("Q4_0", range(-8, 8), -1, (4, 64)),  # scales of both signs
        ("NF4", range(16), -1, (4, 64)),  # levels an uneven step apart
        ("int2_g64_mid_mse", range(-2, 2), -2, (2, 64, 3)),  # a stack, levels at odd halves
    ],
)
def test_map_of_a_format(rng, name, codes, axis, shape):
    u = f32(rng.normal(size=shape))
    q = qjax.quantize(u, name, axis=axis)
    scales, own = q.format.unpack(q.leaves)
    assert int(jnp.min(own)) >= codes.start and int(jnp.max(own)) < codes.stop
    # Every weight's levels, from nothing but the decoder.
    levels = [q.format.decode(scales, jnp.full_like(own, code)) for code in codes]
    levels = np.stack([np.moveaxis(np.asarray(x, np.float64), -1, axis) for x in levels], axis=-1)
    x = np.asarray(u, np.float64)
    clear = np.abs(np.abs(x - qjax.dequantize(q)) - cell(x, levels)[1]) > 1e-3  # not on the border of a cell
    assert clear.mean() > 0.9
    prox = piecewise_affine(name, axis)
    for rho in RHOS:
        got = np.asarray(jax.jit(prox)(u, jnp.float32(rho)))
        np.testing.assert_allclose(got[clear], clipped(x, levels, rho)[clear], atol=1e-5)
    np.testing.assert_array_equal(jax.jit(prox)(u, ONE), u)
    np.testing.assert_array_equal(jax.jit(prox)(u, ZERO), qjax.dequantize(q))


def test_map_of_a_format_outside_of_jit(rng):
    u = f32(rng.normal(size=(64, 5)))
    prox = piecewise_affine("int4_g32", -2)
    np.testing.assert_array_equal(prox(u, ONE), u)
    np.testing.assert_array_equal(prox(u, ZERO), qjax.dequantize(qjax.quantize(u, "int4_g32", axis=-2)))


@pytest.mark.parametrize("rho", RHOS)
def test_relaxed_draws_every_cell_alike(rho):
    u = np.linspace(-2.3, 2.3, 9999)
    w = np.asarray(relaxed(jnp.round)(f32(u), jnp.float32(rho)), np.float64)
    np.testing.assert_allclose(w, np.round(u) + rho * (u - np.round(u)), atol=1e-6)
    jumps = np.diff(w)
    border = np.diff(np.round(u)) > 0
    assert np.all(jumps > 0)  # monotone
    np.testing.assert_allclose(jumps[border], 1 - rho, atol=1e-3)
    np.testing.assert_allclose(jumps[~border], rho * (u[1] - u[0]), atol=1e-6)
    np.testing.assert_array_equal(relaxed(jnp.round)(f32(u), ONE), f32(u))
    np.testing.assert_array_equal(relaxed(jnp.round)(f32(u), ZERO), jnp.round(f32(u)))


def leaves_by_path(tree):
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}


def least_squares(rng, n=64, out=4):
    """A loss of weights [n, out] that correlated inputs couple, and where it is least."""
    x = rng.normal(size=(512, n)) @ (np.eye(n) + 0.8 * rng.normal(size=(n, n)) / np.sqrt(n) + 0.3)
    w = rng.normal(size=(n, out))
    H = x.T @ x / 512
    H = f32(H / np.linalg.eigvalsh(H).max())

    def loss(w_hat):
        e = w_hat - f32(w)
        return 0.5 * jnp.sum(e * jnp.matmul(H, e, precision="highest"))

    return loss, f32(w)


def trained(optimizer, loss, w, steps):
    state = optimizer.init(w)

    @jax.jit
    def step(w, state):
        updates, state = optimizer.update(jax.grad(loss)(w), state, w)
        return optax.apply_updates(w, updates), state

    path = []
    for _ in range(steps):
        w, state = step(w, state)
        path.append(np.asarray(w))
    return w, state, path


def adamw(schedule, wrap=None):
    return partitioned((Group("w", "*", weight_decay=0.1, clip=0.5, wrap=wrap),), schedule)


def test_without_drawing_it_is_the_plain_optimizer_to_the_bit(rng):
    loss, w = least_squares(rng)
    grad = jax.jit(jax.grad(loss))
    wrap = partial(parq, prox=relaxed(int2), rho=optax.constant_schedule(1.0))
    plain, wrapped = adamw(0.05), adamw(0.05, wrap)
    a = b = c = start = 0.1 * w
    plain_state, wrapped_state, jitted_state = plain.init(a), wrapped.init(b), wrapped.init(c)
    update = jax.jit(wrapped.update)
    for _ in range(15):
        updates, plain_state = plain.update(grad(a), plain_state, a)
        a = optax.apply_updates(a, updates)
        updates, wrapped_state = wrapped.update(grad(b), wrapped_state, b)
        b = optax.apply_updates(b, updates)
        updates, jitted_state = update(grad(c), jitted_state, c)
        c = optax.apply_updates(c, updates)
        np.testing.assert_array_equal(b, a)
        for x in (c, latent(jitted_state, c)):
            np.testing.assert_allclose(x, a, rtol=1e-4, atol=1e-6)  # compilers round a b + c once
    assert np.abs(np.asarray(a - start)).max() > 0.1


def test_without_drawing_rare_roundings_do_not_show():
    # Binary fractions just where p + (u - p) is not u, for u = p + d rounded.
    p, d = np.float32([-0.115051165, 0.08644572]), np.float32([0.36505118, -0.58644575])
    assert np.all(p + ((p + d) - p) != p + d)
    optimizer = parq(optax.sgd(1.0), relaxed(jnp.round), optax.constant_schedule(1.0))
    updates, _ = optimizer.update(f32(-d), optimizer.init(f32(p)), f32(p))
    np.testing.assert_array_equal(optax.apply_updates(f32(p), updates), p + d)


def test_drawn_all_the_way_it_is_the_straight_through_estimator(rng):
    loss, w = least_squares(rng)
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.3))
    optimizer = parq(inner, relaxed(int2), optax.constant_schedule(0.0))
    step, grad, rounded = jax.jit(optimizer.update), jax.jit(jax.grad(loss)), jax.jit(int2)
    p, state = rounded(w), optimizer.init(w)
    for _ in range(10):
        u = state.latent
        updates, state = step(grad(p), state, p)
        p = optax.apply_updates(p, updates)
        np.testing.assert_allclose(state.latent, u - 0.3 * (grad(rounded(u)) + 0.1 * u), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(p, rounded(state.latent), rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(state.latent - w)) > 0.1


@pytest.mark.parametrize("prox", [piecewise_affine("uint2_g64", -2), relaxed(int2)], ids=["affine", "relaxed"])
@pytest.mark.parametrize("seed", range(2))
def test_least_squares_ends_on_the_grid_and_below_round_to_nearest(prox, seed):
    loss, w = least_squares(np.random.default_rng(seed))
    rho = inverse_slope(20, 350)
    rate = optax.cosine_decay_schedule(0.02, 400)
    optimizer = partitioned((Group("w", "*", wrap=partial(parq, prox=prox, rho=rho)),), rate)
    got, state, path = trained(optimizer, loss, w, 400)
    u = latent(state, got)
    np.testing.assert_allclose(got, int2(u), rtol=1e-6, atol=1e-6)
    assert float(loss(got)) < 0.8 * float(loss(int2(w)))
    # Four levels for each column, its one group: at the start nearly every weight has a value of its own.
    values = [[len(np.unique(np.round(column, 5))) for column in p.T] for p in (path[0], path[-1])]
    assert min(values[0]) > 50 and max(values[1]) <= 4


def test_part_of_a_partition_and_the_latent_weights_for_export(rng):
    params = {
        "weights": {"q": {"kernel": f32(rng.normal(size=(64, 3)))}, "norm": {"scale": f32(np.ones(3))}},
        "scales": {"s": f32(np.full((1, 3), 0.5))},
    }
    wrap = partial(parq, prox=piecewise_affine("int4_g32", -2), rho=inverse_slope(1, 4))
    kernels = Group("kernels", "weights/*/kernel", weight_decay=0.1, clip=1.0, wrap=wrap)
    groups = (kernels, Group("rest", "weights/*"), Group("scales", "scales/*", 10.0, frozen=True))
    optimizer = partitioned(groups, 0.02)
    traces = []

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        traces.append(None)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(through):
        p = jax.tree.map(jnp.copy, params)
        state = optimizer.init(p)
        for t in range(7):
            grads = jax.tree.map(lambda x: f32(np.random.default_rng(t).normal(size=x.shape)), params)  # noqa: B023
            p, state = step(p, through(state), grads)
        return p, state

    def through_bytes(state):
        leaves, structure = jax.tree.flatten(state)
        return jax.tree.unflatten(structure, [jnp.asarray(np.array(x)) for x in leaves])

    (p, state), again = run(lambda x: x), run(through_bytes)
    assert len(traces) == 1
    for a, b in zip(jax.tree.leaves((p, state)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)

    u = latent(state, p)
    assert jax.tree.structure(u) == jax.tree.structure(p)
    for name in ("weights/norm/scale", "scales/s"):
        np.testing.assert_array_equal(*(leaves_by_path(x)[name] for x in (u, p)))
    kernel, hidden = p["weights"]["q"]["kernel"], u["weights"]["q"]["kernel"]
    exported = qjax.dequantize(qjax.quantize(hidden, "int4_g32", axis=-2))
    np.testing.assert_allclose(kernel, exported, rtol=1e-6, atol=1e-6)
    assert np.mean(np.asarray(hidden != kernel)) > 0.5


def test_step_after_a_change_of_level_lands_on_it(rng):
    # p + (w - p) rounds; but where the level stays for another step, it is met to the bit.
    u = f32(rng.normal(size=(64, 8)))
    optimizer = parq(optax.sgd(1.0), relaxed(int2), optax.constant_schedule(0.0))
    state, p = optimizer.init(u), 3.7 * u
    for _ in range(2):
        updates, state = optimizer.update(jnp.zeros_like(u), state, p)
        p = optax.apply_updates(p, updates)
    np.testing.assert_array_equal(p, int2(u))


def test_inverse_slope():
    rho = np.asarray(jax.jit(jax.vmap(inverse_slope(10, 60, steepness=8.0)))(jnp.arange(100)))
    x = (np.arange(10, 61) - 10) / 50
    sigmoid = 1 / (1 + np.exp(8.0 * (x - 0.5)))
    want = (sigmoid - sigmoid[-1]) / (sigmoid[0] - sigmoid[-1])
    np.testing.assert_allclose(rho[10:61], want, atol=1e-6)
    assert np.all(rho[:11] == 1.0) and np.all(rho[60:] == 0.0) and np.all(np.diff(rho[10:61]) < 0)
    line = jax.vmap(inverse_slope(0, 10, steepness=1e-2))(jnp.arange(11))
    np.testing.assert_allclose(line, 1 - np.arange(11) / 10, atol=1e-4)


def test_mistakes_are_named(rng):
    w = f32(rng.normal(size=(64, 2)))
    optimizer = parq(optax.sgd(1.0), relaxed(int2), optax.constant_schedule(1.0))
    with pytest.raises(UserError, match="parq needs the parameters"):
        optimizer.update(w, optimizer.init(w))
    with pytest.raises(UserError, match="start < end"):
        inverse_slope(10, 10)

    class Lattice(type(qjax.format("int4_g32"))):
        tile = 1, 8

    fmt = qjax.format("int4_g32")
    lattice = object.__new__(Lattice)
    lattice.__dict__.update(fmt.__dict__)
    with pytest.raises(UserError, match="tiles of 1 x 8 weights"):
        piecewise_affine(lattice)
