"""Statistics follow a change of the input as if they had been collected behind it."""

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import UserError
from qjax.stats import KINDS, Stats

TOKENS, N = 50, 6


def collected(x, x_float) -> Stats:
    """All statistics of x [tokens, n], from their definitions in float64."""
    x, x_float = np.asarray(x, np.float64), np.asarray(x_float, np.float64)

    def f32(a):
        return jnp.asarray(a, jnp.float32)

    return Stats(
        H=f32(np.einsum("ti,tj->ij", x, x) / len(x)),
        h=f32((x**2).mean(axis=0)),
        absmean=f32(np.abs(x).mean(axis=0)),
        absmax=f32(np.abs(x).max(axis=0)),
        cross=f32(np.einsum("ti,tj->ij", x_float - x, x) / len(x)),
        samples=f32(x[:4]),
        count=jnp.float32(len(x)),
    )


def stacked(*stats: Stats) -> Stats:
    return Stats(**{k: jnp.stack([getattr(s, k) for s in stats]) for k in (*KINDS, "count")})


def assert_equal(ours: Stats, theirs: Stats, kinds=KINDS):
    for kind in (*kinds, "count"):
        np.testing.assert_allclose(getattr(ours, kind), getattr(theirs, kind), rtol=1e-5, atol=1e-5, err_msg=kind)


@pytest.fixture(scope="module")
def inputs():
    """Inputs now and in the float model, for a stack of two: f64[2, tokens, n]."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, TOKENS, N)) * rng.lognormal(0, 1, N)
    return x, x + 0.1 * rng.standard_normal(x.shape)


ORDER = np.array([3, 1, 5, 0, 2, 4])
D = np.array([2.0, -0.5, 1.0, 3.0, -1.0, 0.25])
B = np.random.default_rng(1).standard_normal((4, N))
LINEAR = ("H", "h", "cross", "samples")
CHANGES = {  # what happens to x, what happens to its statistics, and which of them can follow
    "permute": (lambda x: x[..., ORDER], lambda s: s.permute(jnp.asarray(ORDER)), KINDS),
    "scale": (lambda x: x * D, lambda s: s.scale(jnp.asarray(D, jnp.float32)), KINDS),
    "linear": (lambda x: x @ B.T, lambda s: s.only(LINEAR).linear(jnp.asarray(B, jnp.float32)), LINEAR),
}


@pytest.mark.parametrize("change", CHANGES)
def test_statistics_follow(change, inputs):
    of_x, of_stats, kinds = CHANGES[change]
    x, x_float = (a[0] for a in inputs)
    assert_equal(of_stats(collected(x, x_float)), collected(of_x(x), of_x(x_float)), kinds)


@pytest.mark.parametrize("change", CHANGES)
def test_stacks_follow_one_by_one(change, inputs):
    of_x, of_stats, kinds = CHANGES[change]
    x, x_float = inputs
    now = stacked(*(collected(a, b) for a, b in zip(x, x_float, strict=True)))
    then = stacked(*(collected(of_x(a), of_x(b)) for a, b in zip(x, x_float, strict=True)))
    assert_equal(of_stats(now), then, kinds)


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_not_collected_stays_away(change):
    changed = CHANGES[change][1](Stats(H=jnp.eye(N)))
    assert changed.kinds == ("H",) and changed.count is None


def test_a_permutation_and_a_scale_are_linear(inputs):
    s = collected(*(a[0] for a in inputs)).only(LINEAR)
    eye = jnp.eye(N)
    assert_equal(s.permute(jnp.asarray(ORDER)), s.linear(eye[jnp.asarray(ORDER)]), LINEAR)
    assert_equal(s.scale(jnp.asarray(D, jnp.float32)), s.linear(jnp.diag(jnp.asarray(D, jnp.float32))), LINEAR)


@pytest.mark.parametrize("kinds, word", [(("absmean",), "absmean"), (("H", "absmax"), "absmax"), (("h",), "collect H")])
def test_a_rotation_refuses_what_it_destroys(kinds, word, inputs):
    s = collected(*(a[0] for a in inputs)).only(kinds)
    with pytest.raises(UserError, match=word):
        s.linear(jnp.eye(N))


def test_importance_is_h_or_the_diagonal_of_H(inputs):
    s = collected(*(a[0] for a in inputs))
    np.testing.assert_array_equal(s.only(("h",)).importance, s.h)
    np.testing.assert_allclose(s.only(("H",)).importance, s.h, rtol=1e-6)
    assert s.only(("absmax",)).importance is None
    assert stacked(s, s).only(("H",)).importance.shape == (2, N)


def test_only_keeps_the_count(inputs):
    s = collected(*(a[0] for a in inputs))
    assert s.kinds == KINDS
    kept = s.only(("H", "absmax"))
    assert kept.kinds == ("H", "absmax") and kept.count == TOKENS
