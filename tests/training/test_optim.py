"""Optimizers by group, schedules and the average of parameters, against AdamW and the formulas in float64 numpy."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qjax.errors import UserError
from qjax.training.optim.groups import Group, ema_update, grad_norms, labels, partitioned, rates
from qjax.training.optim.schedules import warmup_constant_cooldown, warmup_cosine

RATE, DECAY = 0.02, 0.3


@partial(jax.tree_util.register_dataclass, data_fields=("a", "b"), meta_fields=("rank",))
@dataclasses.dataclass(frozen=True)
class LowRank:
    a: object
    b: object
    rank: int = 2


def two_groups(rate=1.0, scale_rate=None, weight_decay=0.0, clip=1.0):
    """Weights, and scales at ten times their rate."""
    scales = Group("scales", "scales/*", 10 * rate if scale_rate is None else scale_rate, 0.0, clip)
    return Group("weights", "weights/*", rate, weight_decay, clip), scales


def f32(x):
    return jnp.asarray(np.asarray(x), jnp.float32)


def tree(rng):
    return {
        "weights": {"q": {"kernel": f32(rng.normal(size=(6, 4)))}, "norm": {"scale": f32(rng.normal(size=4))}},
        "scales": {"q": {"s": f32(rng.uniform(0.1, 1.0, size=(3, 4)))}},
    }


def gradients(rng, params, large=1.0):
    grads = jax.tree.map(lambda p: f32(rng.normal(size=p.shape)), params)
    return {**grads, "scales": jax.tree.map(lambda g: large * g, grads["scales"])}


def trained(optimizer, params, all_grads):
    state = optimizer.init(params)
    for grads in all_grads:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def adamw(leaves, all_grads, rate_at, decays, clip, b1=0.9, b2=0.95, eps=1e-8):
    """One group by hand: its leaves, their gradients step by step, the decay of each leaf."""
    p = [np.asarray(x, np.float64) for x in leaves]
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for t, grads in enumerate(all_grads):
        g = [np.asarray(x, np.float64) for x in grads]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        g = [x * min(1.0, clip / norm) for x in g]
        for i in range(len(p)):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            m_hat, v_hat = m[i] / (1 - b1 ** (t + 1)), v[i] / (1 - b2 ** (t + 1))
            p[i] = p[i] - rate_at(t) * (m_hat / (np.sqrt(v_hat) + eps) + decays[i] * p[i])
    return p


def test_each_group_is_adamw_of_its_own(rng):
    params = tree(rng)
    all_grads = [gradients(rng, params, large=100.0 * (t + 1)) for t in range(8)]
    groups = two_groups(RATE, weight_decay=DECAY, clip=1.5)
    after = trained(partitioned(groups, lambda step: 1.0 / (1.0 + step)), params, all_grads)

    def by_hand(part, rate, decays):
        leaves = [jax.tree.leaves(g[part]) for g in all_grads]
        return adamw(jax.tree.leaves(params[part]), leaves, lambda t: rate / (1 + t), decays, 1.5)

    # jax.tree.leaves sorts the keys: norm (a vector, which does not decay) comes before q.
    for part, rate, decays in (("weights", RATE, [0.0, DECAY]), ("scales", 10 * RATE, [0.0])):
        for got, want in zip(jax.tree.leaves(after[part]), by_hand(part, rate, decays), strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_weights_do_not_see_how_large_the_gradients_of_scales_are(rng):
    params = tree(rng)
    small = [gradients(np.random.default_rng(t), params) for t in range(3)]
    large = [gradients(np.random.default_rng(t), params, large=1e6) for t in range(3)]
    optimizer = partitioned(two_groups(RATE, clip=0.1), 1.0)
    a, b = trained(optimizer, params, small), trained(optimizer, params, large)
    for x, y in zip(jax.tree.leaves(a["weights"]), jax.tree.leaves(b["weights"]), strict=True):
        np.testing.assert_array_equal(x, y)
    # Under one common norm they would.
    common = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(RATE))
    a, b = trained(common, params, small), trained(common, params, large)
    assert not np.allclose(a["weights"]["q"]["kernel"], b["weights"]["q"]["kernel"])


def test_a_factor_on_the_gradient_of_scales_cancels_under_adam_but_not_under_sgd(rng):
    codes, target = f32(rng.integers(-7, 8, size=(64, 4))), f32(rng.normal(size=(64, 4)))

    def loss(params, g):
        s = params["scales"]["s"]
        s = s * g + jax.lax.stop_gradient(s * (1.0 - g))  # LSQ's way to scale a gradient
        return jnp.mean((codes * s[None] + params["weights"]["b"] - target) ** 2)

    def run(scale, g):
        optimizer = partitioned(two_groups(1e-3, clip=None), 1.0, scale)
        params = {"scales": {"s": jnp.full(4, 0.3)}, "weights": {"b": jnp.zeros((1, 4))}}
        grad = jax.jit(jax.grad(loss))
        state = optimizer.init(params)
        for _ in range(50):
            updates, state = optimizer.update(grad(params, g), state, params)
            params = optax.apply_updates(params, updates)
        return np.asarray(params["scales"]["s"])

    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    np.testing.assert_allclose(run(adam, 1e-3), run(adam, 1.0), rtol=1e-3)
    assert np.max(np.abs(run(adam, 1.0) - 0.3)) > 0.1  # it has moved
    assert np.max(np.abs(run(optax.identity(), 1e-3) / run(optax.identity(), 1.0) - 1)) > 0.1


def test_frozen_groups_do_not_move_by_a_bit(rng):
    params = tree(rng)
    groups = (
        Group("frozen", "weights/q/*", frozen=True, weight_decay=0.5, clip=1.0),
        Group("rest", "*"),
    )
    after = trained(partitioned(groups, RATE), params, [gradients(rng, params) for _ in range(3)])
    assert (
        np.asarray(after["weights"]["q"]["kernel"]).tobytes() == np.asarray(params["weights"]["q"]["kernel"]).tobytes()
    )
    for x, y in ((after["weights"]["norm"], params["weights"]["norm"]), (after["scales"], params["scales"])):
        assert all(np.all(a != b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
    moments = [x for x in jax.tree.leaves(partitioned(groups, RATE).init(params)) if x.shape == (6, 4)]
    assert not moments, "a frozen matrix has moments"


def test_labels_take_the_first_pattern_that_fits_the_whole_path():
    params = {
        "adapters": {"q": LowRank(jnp.zeros((4, 2)), jnp.zeros((2, 4)))},
        "weights": {"layers_0": {"w": jnp.zeros((2, 2))}, "layers_10": {"w": jnp.zeros((2, 2))}},
    }
    groups = (
        Group("early", "re:weights/layers_[0-9]/.*"),
        Group("late", "weights/*"),
        Group("b", "*/b"),
        Group("a", "adapters/q/?"),
    )
    found = labels(params, groups)
    assert found["weights"] == {"layers_0": {"w": "early"}, "layers_10": {"w": "late"}}
    assert found["adapters"]["q"] == LowRank("a", "b")
    assert jax.tree.structure(found) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((Group("w", "weights/*"),), "no group takes the parameter 'scales/q/s'"),
        ((Group("s", "scales"), Group("w", "weights/*")), "'scales/q/s'"),  # the whole path, not its start
        (
            (*two_groups(), Group("lora", "adapters/*")),
            "group 'lora' takes no parameter: its pattern is 'adapters/*'; parameters are named like 'scales/q/s'",
        ),
        (
            (Group("all", "*"), Group("s", "scales/*")),
            "its pattern is 'scales/*'; 'scales/q/s' fits, but belongs to the earlier group 'all'",
        ),
        ((Group("x", "scales/*"), Group("x", "weights/*")), "two groups are called 'x'"),
        ((Group("x", "re:(", 1.0),), "group 'x': 're:(' is no regular expression"),
    ],
)
def test_mistakes_in_groups_are_named(rng, groups, message):
    with pytest.raises(UserError, match=re.escape(message)):
        labels(tree(rng), groups)
    with pytest.raises(UserError, match=re.escape(message)):
        partitioned(groups, RATE).init(tree(rng))


def test_rates_and_norms_by_group(rng):
    params = tree(rng)
    groups = (*two_groups(2.0)[:1], Group("scales", "scales/*", frozen=True))
    schedule = warmup_cosine(1e-3, total=100, warmup=10)
    assert {k: float(v) for k, v in rates(groups, schedule, 5).items()} == {
        "weights": pytest.approx(1e-3),
        "scales": 0.0,
    }
    grads = gradients(rng, params)
    norms = jax.jit(lambda g: grad_norms(g, labels(g, groups)))(grads)
    for part in ("weights", "scales"):
        flat = np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(grads[part])])
        assert float(norms[part]) == pytest.approx(np.linalg.norm(flat), rel=1e-6)


def test_rates_are_those_that_the_optimizer_uses(rng):
    params = tree(rng)
    groups = two_groups(0.7, 3.0, clip=None)
    schedule = warmup_cosine(1e-2, total=20, warmup=5)
    optimizer = partitioned(groups, schedule, optax.identity())
    state = optimizer.init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    for step in range(4):
        updates, state = optimizer.update(ones, state, params)
        now = rates(groups, schedule, step)
        for part in ("weights", "scales"):
            for x in jax.tree.leaves(updates[part]):
                np.testing.assert_allclose(x, -float(now[part]), rtol=1e-6)


def test_one_compilation_and_a_state_of_plain_arrays(rng):
    params = tree(rng)
    groups = two_groups(RATE, weight_decay=DECAY)
    schedule = warmup_constant_cooldown(1.0, total=10, warmup=2, cooldown=5)
    optimizer = partitioned(groups, schedule)
    traces = []

    @jax.jit
    def step(params, ema, state, t, grads):
        traces.append(None)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, ema_update(ema, params, 0.99, t), state, t + 1, rates(groups, schedule, t)

    def run(through):
        p, ema, state, t = params, params, optimizer.init(params), jnp.zeros((), jnp.int32)
        for i in range(6):
            p, ema, state, t, _ = step(p, ema, through(state), t, gradients(np.random.default_rng(i), params))
        return p, ema, state

    def through_bytes(state):
        leaves, structure = jax.tree.flatten(state)
        return jax.tree.unflatten(structure, [jnp.asarray(np.array(x)) for x in leaves])

    a, b = run(lambda state: state), run(through_bytes)
    assert len(traces) == 1
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(a[2]))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_warmup_cosine_is_that_of_optax():
    ours = jax.vmap(warmup_cosine(3e-3, total=200, warmup=20, floor=3e-4))(jnp.arange(250))
    theirs = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 20, 200, 3e-4)
    np.testing.assert_allclose(ours, [float(theirs(t)) for t in range(250)], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "cooldown"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + np.cos(np.pi * x)) / 2),
        ("sqrt", lambda x: 1 - np.sqrt(x)),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_warmup_constant_cooldown(shape, cooldown, floor):
    rate = warmup_constant_cooldown(2.0, total=120, warmup=30, cooldown=40, shape=shape, floor=floor)
    got = np.asarray(jax.jit(jax.vmap(rate))(jnp.arange(150)))
    t = np.arange(150)
    x = np.clip((t - 80) / 40, 0, 1)
    want = np.where(t < 80, 2 * np.minimum(t / 30, 1), floor + (2 - floor) * cooldown(x))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert got[0] == 0.0 and np.all(got[30:81] == 2.0) and np.all(got[120:] == np.float32(floor))
    assert np.all(np.diff(got[:31]) > 0) and np.all(np.diff(got[80:121]) < 0)
    assert got.dtype == np.float32 and float(rate(100)) == pytest.approx(got[100])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: warmup_constant_cooldown(1.0, 10, 6, 5), "must fit into 10 steps"),
        (lambda: warmup_cosine(1.0, 10, 10), "must fit into 10 steps"),
        (lambda: warmup_constant_cooldown(1.0, 10, 1, 5, "exp"), "'exp'; there are linear, cosine, sqrt"),
        (lambda: warmup_constant_cooldown(1.0, 10, 1, 5, floor=2.0), "floor"),
    ],
)
def test_mistakes_in_schedules_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_average_of_parameters(rng):
    params = [tree(rng) for _ in range(40)]
    ema, decay = params[0], 0.7
    want = [np.asarray(x, np.float64) for x in jax.tree.leaves(ema)]
    update = jax.jit(partial(ema_update, decay=decay))
    for t, p in enumerate(params):
        ema = update(ema, p, step=t)
        d = min(decay, (1 + t) / (10 + t))
        want = [d * e + (1 - d) * np.asarray(x, np.float64) for e, x in zip(want, jax.tree.leaves(p), strict=True)]
    for got, e in zip(jax.tree.leaves(ema), want, strict=True):
        np.testing.assert_allclose(got, e, rtol=1e-5, atol=1e-6)
    # Parameters that stand still are their own average, from the first step on.
    still = ema_update(params[0], params[0], 0.999, 0)
    for x, y in zip(jax.tree.leaves(still), jax.tree.leaves(params[0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
