"""Against the optimum: all codes of small problems by brute force, and the float64 block algorithm on lattices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding_problems import damped64, factor, losses, marked, problem, second_moment
from rounding_reference import block_ldl, block_ldlq
from rounding_toys import Checkerboard, Few, even_integers

from qjax.formats.protocol import Format
from qjax.rounding import descend, ldlq, nearest, refit, round_weight
from qjax.stats import Stats

DAMPING = 0.05
PROBLEMS, ROWS, N = 24, 4, 8
TERNARY, QUATERNARY = Few(), Few((-1.5, -0.5, 0.5, 1.5))
FIXED = {  # chains that keep the scales
    "nearest": (nearest(),),
    "ldlq act": (nearest(), ldlq("act")),
    "descend": (nearest(), descend(3)),
    "ldlq descend": (nearest(), ldlq("act"), descend(3)),
}
BEST = (nearest(), ldlq("act"), descend(3), refit())


@pytest.fixture(scope="module")
def small():
    """(w, H), a stack of problems of 8 columns each."""
    w = np.random.default_rng(0).standard_normal((PROBLEMS, ROWS, N)).astype(np.float32)
    H = np.stack([second_moment(N, seed, tokens=64) for seed in range(PROBLEMS)])
    return jnp.asarray(w), jnp.asarray(H)


def rounded(small, fmt, chain):
    w, H = small
    return jax.jit(jax.vmap(lambda w, H: round_weight(w, fmt, chain, Stats(H=H), DAMPING)))(w, H)


def loss_of(small, fmt, r) -> np.ndarray:
    """Damped loss of each row, f64[problems, rows]."""
    w_hat = fmt.decode(r.scales, r.codes)
    return np.stack([losses(w, q, damped64(H, DAMPING)) for w, q, H in zip(small[0], w_hat, small[1], strict=True)])


def least_loss(small, fmt, scales) -> np.ndarray:
    """The least of all codes at these scales, f64[problems, rows]."""
    points = np.array(list(itertools.product(fmt.levels, repeat=N)))
    best = np.empty((PROBLEMS, ROWS))
    for i, (w, H) in enumerate(zip(*small, strict=True)):
        for row in range(ROWS):
            q = float(scales["s"][i, row, 0]) * points
            best[i, row] = losses(np.broadcast_to(np.float64(w[row]), q.shape), q, damped64(H, DAMPING)).min()
    return best


@pytest.mark.parametrize("fmt", [TERNARY, Checkerboard(2)], ids=str)
def test_the_toys_are_formats(fmt):
    assert isinstance(fmt, Format)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", marked([TERNARY, QUATERNARY], [TERNARY]), ids=["ternary", "quaternary"])
def test_brute_force_bounds_every_rounding_and_the_chain_comes_close(fmt, small):
    found = {name: rounded(small, fmt, chain) for name, chain in FIXED.items()}
    best = least_loss(small, fmt, found["nearest"].scales)
    ratio = {name: loss_of(small, fmt, r) / best for name, r in found.items()}
    for name, r in ratio.items():
        assert (r >= 1 - 1e-5).all(), name
    median = {name: float(np.median(r)) for name, r in ratio.items()}
    print(fmt.levels, {name: f"{m:.3f}" for name, m in median.items()})
    assert median["ldlq descend"] <= 1.1
    assert median["ldlq descend"] <= median["ldlq act"] <= median["nearest"]


@pytest.mark.slow
def test_refit_goes_below_the_optimum_of_the_scales_it_was_given(small):
    found = rounded(small, TERNARY, BEST)
    loss = loss_of(small, TERNARY, found)
    assert (loss >= least_loss(small, TERNARY, found.scales) * (1 - 1e-5)).all()
    given = least_loss(small, TERNARY, rounded(small, TERNARY, FIXED["nearest"]).scales)
    assert np.median(loss / given) < 0.95


# lattices: tiles of several weights


@pytest.mark.parametrize("tile", [2, 3, 4])
def test_the_lattice_decoder_finds_the_nearest_point(tile):
    u = np.random.default_rng(tile).uniform(-5, 5, (200, tile)).astype(np.float32)
    ours, theirs = np.asarray(Checkerboard(tile).level(jnp.asarray(u))), even_integers(u)
    np.testing.assert_allclose(((ours - u) ** 2).sum(1), ((theirs - u) ** 2).sum(1), rtol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("tile", [2, 4, 8])
def test_the_block_factor_is_that_of_float64(tile):
    H = second_moment(64)
    feedback, _ = factor(jnp.asarray(H), DAMPING, tile)
    np.testing.assert_allclose(feedback, block_ldl(damped64(H, DAMPING), tile)[0] - np.eye(64), atol=1e-4)


TILES = [(2, 64), (4, 64), (4, 320), (3, 48), (3, 288), (24, 96)]
TILES_ALL = [(tile, n, order) for tile, n in TILES for order in ("natural", "act")]
TILES_FAST = [(2, 64, "natural"), (4, 320, "act"), (3, 48, "natural"), (24, 96, "act")]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("tile, n, order", marked(TILES_ALL, TILES_FAST))
def test_ldlq_on_tiles_is_the_block_algorithm(tile, n, order):
    w, H = problem(8, n)
    fmt = Checkerboard(tile) if tile < 24 else Cubic(24)
    r = round_weight(w, fmt, (nearest(), ldlq(order)), Stats(H=H), DAMPING)
    ours = np.float64(fmt.decode(r.scales, r.codes))

    peak = np.diag(H).reshape(-1, tile).max(axis=1)
    tiles = np.arange(n // tile)[::-1] if order == "natural" else np.argsort(peak, kind="stable")
    columns = (tiles[:, None] * tile + np.arange(tile)).ravel()  # the last are rounded first
    s = np.float64(r.scales["s"])

    def decode(t):
        return s * (even_integers(t / s) if tile < 24 else np.round(t / s))

    theirs = np.empty_like(ours)
    H64 = damped64(H, DAMPING)[np.ix_(columns, columns)]
    theirs[:, columns] = block_ldlq(np.float64(w)[:, columns], H64, tile, decode)
    assert np.isclose(ours, theirs, rtol=1e-5, atol=1e-6).all(axis=1).sum() >= 7  # a tie is rare
    assert losses(w, ours, H).sum() == pytest.approx(losses(w, theirs, H).sum(), rel=1e-2)


class Cubic(Checkerboard):
    """All integer points, taken a tile at a time."""

    def level(self, u):
        return jnp.round(u)


FALL = list(itertools.product([2, 4], [descend(1), descend(3), refit()]))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("tile, stage", marked(FALL, [(4, descend(3)), (2, refit())]), ids=str)
def test_descend_and_refit_on_tiles_never_raise_the_loss(tile, stage):
    w, H = problem(8, 64)
    fmt = Checkerboard(tile)
    loss = []
    for chain in ((nearest(),), (nearest(), stage)):
        r = round_weight(w, fmt, chain, Stats(H=H), DAMPING)
        assert (np.asarray(r.codes).reshape(-1, tile).sum(axis=1) % 2 == 0).all()  # still on the lattice
        loss.append(losses(w, fmt.decode(r.scales, r.codes), damped64(H, DAMPING)))
    assert (loss[1] <= loss[0] * (1 + 1e-5)).all()
    assert loss[1].sum() < 0.9 * loss[0].sum()


@pytest.mark.slow
def test_a_lattice_of_one_dimension_more_is_no_worse_than_its_cube():
    """LDLQ on D4 with the cube's density: the lattice's gain (0.37 dB) is there behind the feedback too."""
    w, H = problem(64, 128)
    cube, lattice = Cubic(4, scale_of_rms=0.25), Checkerboard(4, scale_of_rms=0.25 * 2**-0.25)
    loss = [float(round_weight(w, f, (nearest(), ldlq()), Stats(H=H), DAMPING).loss) for f in (cube, lattice)]
    assert loss[1] < loss[0]
