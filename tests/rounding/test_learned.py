"""Learned rounding and clipping: gains, the estimator, the published update, bounds, chains.

Never worse than the start, on every format: test_rounding_contract.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from rounding_problems import damped64, losses, problem, second_moment, staged
from rounding_toys import Few

import qjax
from qjax.errors import UserError
from qjax.rounding import Rounding, check_chain, ldlq, nearest, round_weight
from qjax.rounding.gradient import cells, on_grid
from qjax.rounding.learned import adam, learned, learned_clipping
from qjax.rounding.protocol import DAMPING, State
from qjax.rounding.ranges import ends, gap, level
from qjax.stats import Stats

ROWS, N = 8, 512
GAINS = {  # what learned() leaves of the damped loss of nearest(), at most
    "uint4_g32": 0.6, "uint3_g64": 0.6, "int4_g32": 0.6, "Q4_0": 0.6, "Q4_K": 0.75, "NF4": 0.7, "NVFP4": 0.7,
}  # fmt: skip


def loss_of(state, fmt, w, H) -> np.ndarray:
    """Damped, f64[rows], or [1] where rows are tied."""
    by_row = losses(w, fmt.decode(state.scales, state.codes), damped64(H, DAMPING))
    return by_row if fmt.rows == 1 else by_row.sum()[None]


def assert_stored_exactly(fmt, state):
    again_scales, again = fmt.unpack(fmt.pack(state.scales, state.codes))
    np.testing.assert_array_equal(again, state.codes)
    for key, value in state.scales.items():
        np.testing.assert_array_equal(again_scales[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("name", GAINS)
def test_it_beats_nearest(name):
    w, H = problem(ROWS, N)
    fmt = qjax.format(name)
    before, after = staged(w, H, fmt, nearest(), learned())
    first, last = loss_of(before, fmt, w, H), loss_of(after, fmt, w, H)
    assert_stored_exactly(fmt, after)
    assert (last <= first * (1 + 1e-5)).all() and last.sum() < GAINS[name] * first.sum()


DENSE = ("F32", "F16", "BF16")


@pytest.mark.parametrize("stage", [learned(), learned_clipping()], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_a_format_without_scales_is_refused(name, stage):
    with pytest.raises(UserError, match=f"lm_head: .*{name} has no scales to learn"):
        check_chain((nearest(), stage), qjax.format(name), Stats(H=jnp.eye(N)), "lm_head")


@pytest.mark.slow
def test_clipping_helps_and_feedback_follows():
    w, H = problem(ROWS, N)
    fmt, stats = qjax.format("uint2_g64"), Stats(H=H)
    chains = {"nearest": (nearest(),), "clipped": (nearest(), learned_clipping()), "ldlq": (nearest(), ldlq()),
              "both": (nearest(), learned_clipping(), ldlq())}  # fmt: skip
    for chain in chains.values():
        check_chain(chain, fmt, stats)
    found = {k: float(round_weight(w, fmt, chain, stats).loss) for k, chain in chains.items()}
    assert found["clipped"] < 0.75 * found["nearest"] and found["both"] < 0.9 * found["ldlq"]


# the estimator


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["uint3_g64", "int3_g64_mid_mse", "NF4", "NVFP4", "IQ4_NL"])
def test_the_gradient_is_one_in_the_cells_and_zero_outside(name):
    fmt = qjax.format(name)
    lo, hi = (float(x) for x in cells(fmt))
    u = jnp.linspace(2 * lo - 1, 2 * hi + 1, 999)
    grid = (jnp.ones((1, 1)), None)
    t, grad = jax.jit(lambda u: jax.vjp(lambda u: on_grid(fmt, grid, u[None], None)[0][0], u))(u)
    np.testing.assert_array_equal(t, level(fmt, u))
    inside = (np.asarray(u) > lo) & (np.asarray(u) < hi)
    np.testing.assert_array_equal(grad(jnp.full_like(u, 3.0))[0], np.where(inside, 3.0, 0.0))
    assert 0 < inside.sum() < len(u)


@pytest.mark.parametrize("name", ["uint4_g32", "int3_g64_mid_mse", "NF4", "NVFP4", "IQ4_NL", "FP8_E4M3_b128"])
def test_gaps_lead_to_the_next_level(name):
    fmt = qjax.format(name)
    lo, hi = (float(x) for x in ends(fmt))
    signs = np.geomspace(1e-4, 1, 20_000) * max(-lo, hi)
    levels = np.unique(level(fmt, jnp.asarray(np.concatenate([-signs, [0], signs]), jnp.float32)))
    assert levels[0] == lo and levels[-1] == hi
    t = jnp.asarray(levels, jnp.float32)
    above, below = (np.asarray(gap(fmt, t, jnp.full(t.shape, up))) for up in (True, False))
    assert above[-1] == below[0] == 0
    step = np.diff(levels)
    if name == "NF4":  # borders are float32 midpoints
        np.testing.assert_allclose(above[:-1], step, rtol=1e-5)
    elif name != "FP8_E4M3_b128":
        np.testing.assert_allclose(above[:-1], step, rtol=3e-6)
        np.testing.assert_allclose(below[1:], step, rtol=3e-6)
    else:
        assert (np.abs(above[:-1] - step) <= 1e-3 * step + 1e-6).mean() > 0.9


# the published update


def published(w, H, s0, z0, top, steps):
    """AutoRound's loop on tr(E H E^T) in float64, ranges and all, on f32 scales and integer zeros: the best by row."""
    rows, groups = s0.shape
    x, low, high = w.reshape(rows, groups, -1), -s0 * z0, s0 * (top - z0)
    v, a, b = np.zeros_like(x), np.ones_like(s0), np.ones_like(s0)
    least = np.full(rows, np.inf)
    for t in range(steps):
        s = (b * high - a * low) / top
        z = np.clip(np.round(-a * low / s), 0, top)
        u = x / s[..., None] + v + z[..., None]
        q = np.clip(np.round(u), 0, top)
        e = (x - s[..., None] * (q - z[..., None])).reshape(w.shape)
        least = np.minimum(least, np.einsum("ri,ij,rj->r", e, H, e))
        grad = (-2 * e @ H).reshape(x.shape)  # by w_hat
        inside = (np.round(u) >= 0) & (np.round(u) <= top)
        by_s = (grad * (q - inside * (x / s[..., None] + z[..., None]))).sum(-1)
        by_m = (grad * ~inside).sum(-1)  # straight through the rounding of z = -m / s
        lr = (1 - t / steps) / steps
        v = np.clip(v - lr * np.sign(grad * s[..., None] * inside), -0.5, 0.5)
        b = np.clip(b - lr * np.sign(by_s * high / top), 0, 1)
        a = np.clip(a - lr * np.sign((by_m - by_s / top) * low), 0, 1)
    return least


def test_the_loss_is_that_of_the_published_loop():
    """Signs of tiny gradients may differ between float32 and float64: close, not equal."""
    w, H = problem(32, 128)
    fmt = qjax.format("uint3_g64_f32")
    before, after = staged(w, H, fmt, nearest(), learned(50))
    s0, z0 = (np.float64(before.scales[k]) for k in ("scale", "zero"))
    expected = published(np.float64(w), damped64(H, DAMPING), s0, z0, 7, 50)
    found, first = loss_of(after, fmt, w, H), loss_of(before, fmt, w, H)
    assert expected.sum() < 0.8 * first.sum()
    np.testing.assert_allclose(found.sum(), expected.sum(), rtol=0.03)


@pytest.mark.slow
def test_one_step_is_the_sign_of_the_gradient():
    """Two steps: the second is judged behind one update of the first's size, which flips what lies that near a tie."""
    fmt, w, H = Few(tuple(float(i) for i in range(-4, 5))), jnp.full((1, 8), 0.0), np.eye(8, dtype=np.float32)
    state = nearest()(State(None, None, w.at[0, 0].set(4.0), jnp.float32(DAMPING)), fmt, Stats())
    s = float(state.scales["s"][0, 0])
    H = jnp.asarray(H + 0.9 * (1 - np.eye(8)), jnp.float32)
    target = jnp.asarray(s * (np.full(8, 1.4) + 0.0), jnp.float32)[None]
    start = State(state.scales, fmt.nearest(state.scales, target), target, jnp.float32(DAMPING))
    after = learned(2, lr=0.15, ranges=False)(start, fmt, Stats(H=H))  # all want up: 1.4 + 0.15 rounds to 2
    before, last = loss_of(start, fmt, target, H), loss_of(after, fmt, target, H)
    up = fmt.decode(after.scales, after.codes) / s
    assert last <= before
    np.testing.assert_allclose(up, 1.0, rtol=1e-6)  # -0.4 each is better than +0.6 each, so the start is kept


def test_adam_is_optax():
    import optax

    grads = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    with jax.numpy_dtype_promotion("standard"):
        made = optax.adam(1.0, eps=0.0)
        memory, expected = made.init(jnp.zeros(7)), []
        for g in grads:
            update, memory = made.update(jnp.asarray(g), memory)
            expected.append(-np.asarray(update))
    moments = (jnp.zeros(7), jnp.zeros(7))
    for t, g in enumerate(grads):
        direction, moments = adam(jnp.int32(t), moments, jnp.asarray(g))
        np.testing.assert_allclose(direction, expected[t], rtol=1e-4)
    assert not np.asarray(adam(jnp.int32(0), (jnp.zeros(3), jnp.zeros(3)), jnp.zeros(3))[0]).any()


# bounds and transformations


@pytest.mark.sampled(1)
@pytest.mark.parametrize("levels", [(-1.0, 0.0, 1.0), (-1.5, -0.5, 0.5, 1.5), (-1.0, -0.3, 0.1, 1.2)])
def test_between_nearest_and_the_best_of_all_codes(levels):
    fmt, n, rows = Few(levels), 8, 16
    w = jnp.asarray(np.random.default_rng(0).standard_normal((rows, n)), jnp.float32)
    H = jnp.asarray(second_moment(n, tokens=64))
    before, after = staged(w, H, fmt, nearest(), learned(ranges=False))
    points = np.array(list(itertools.product(fmt.levels, repeat=n)))
    least = np.empty(rows)
    for row in range(rows):
        q = float(after.scales["s"][row, 0]) * points
        least[row] = losses(np.broadcast_to(np.float64(w[row]), q.shape), q, damped64(H, DAMPING)).min()
    first, last = loss_of(before, fmt, w, H), loss_of(after, fmt, w, H)
    assert (last >= least * (1 - 1e-5)).all() and (last <= first * (1 + 1e-5)).all()
    assert last.sum() - least.sum() < 0.6 * (first.sum() - least.sum())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [learned(50), learned_clipping(50)], ids=["learned", "clipping"])
def test_a_stack_is_its_members_and_nothing_compiles_twice(stage):
    pairs = [problem(ROWS, 256, seed) for seed in range(3)]
    ws, Hs = jnp.stack([w for w, _ in pairs]), jnp.stack([H for _, H in pairs])
    fmt = qjax.format("uint3_g64")

    def one(w, H):
        return round_weight(w, fmt, (nearest(), stage), Stats(H=H)).loss

    alone = np.array([one(w, H) for w, H in pairs])
    before = round_weight._cache_size()
    one(2 * ws[0], Hs[1])
    assert round_weight._cache_size() == before
    scanned = jax.jit(lambda w, H: lax.scan(lambda c, x: (c, one(*x)), 0, (w, H))[1])
    for way in (jax.jit(jax.vmap(one)), scanned):
        np.testing.assert_allclose(way(ws, Hs), alone, rtol=0.03)  # a sign that differs leads the path elsewhere


@pytest.mark.slow
def test_an_indefinite_H_is_told_and_zeros_stay_finite():
    fmt = qjax.format("uint4_g32")
    w, H = problem(ROWS, 256)
    r = round_weight(w, fmt, (nearest(), learned(5)), Stats(H=H - 2 * jnp.eye(256) * jnp.max(H)))
    assert np.isnan(float(r.damping))
    for stage in (learned(5), learned_clipping(5)):
        r = round_weight(w.at[0].set(0.0), fmt, (nearest(), stage), Stats(H=H.at[:3].set(0.0).at[:, :3].set(0.0)))
        w_hat = np.asarray(fmt.decode(r.scales, r.codes))
        assert np.isfinite(w_hat).all() and not w_hat[0].any()


def test_records_requirements_and_errors():
    for stage in (learned(), learned_clipping()):
        assert isinstance(stage, Rounding) and hash(stage) == hash(dataclasses.replace(stage))
        assert stage.requires == {"H"}
        with pytest.raises(UserError, match="'H'"):
            check_chain((nearest(), stage), qjax.format("Q4_0"), Stats())
        with pytest.raises(UserError, match="first rounding must fit"):
            check_chain((stage,), qjax.format("Q4_0"), Stats(H=jnp.eye(32)))
    for make in (learned, learned_clipping):
        with pytest.raises(UserError, match=f"{make.__name__}: steps"):
            make(0)
        with pytest.raises(UserError, match="lr must be positive"):
            make(lr=-1.0)
