"""What weights see: exact sums, shared by input, stacked by scan, the same on eight devices, every flaw named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.calibrate import load_stats, observe, save_stats
from qjax.errors import UserError

N = 24


def mlp(params, x):
    h = x @ params["q"] + x @ params["k"]
    return jnp.tanh(h) @ params["out"]


@pytest.fixture
def params(rng):
    shapes = {"q": (N, 16), "k": (N, 16), "out": (16, 8)}
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}


@pytest.fixture
def batches(rng):
    return [jnp.asarray(rng.standard_normal((5, 7, N)), jnp.float32) for _ in range(3)]


def test_every_kind_equals_an_explicit_computation(params, batches):
    stats = observe(mlp, params, batches, kinds=("H", "h", "absmean", "absmax", "samples"))
    assert set(stats) == {"q", "k", "out"} and stats["q"] is stats["k"]
    x = np.concatenate([np.asarray(b).reshape(-1, N) for b in batches]).astype(np.float64)
    hidden = np.tanh(x @ np.asarray(params["q"], np.float64) + x @ np.asarray(params["k"], np.float64))
    for name, seen in (("q", x), ("out", hidden)):
        s = stats[name]
        np.testing.assert_allclose(s.H, seen.T @ seen / len(seen), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(s.h, (seen**2).mean(0), rtol=1e-4)
        np.testing.assert_allclose(s.absmean, np.abs(seen).mean(0), rtol=1e-4)
        np.testing.assert_allclose(s.absmax, np.abs(seen).max(0), rtol=1e-5)
        assert float(s.count) == len(x)
        np.testing.assert_allclose(s.samples[: len(x)], seen, rtol=1e-3, atol=1e-5)


def test_cross_compares_with_the_float_model(params, batches):
    """`out` reads what q and k have become; q and k read the same input in both models."""
    now = params | {"q": params["q"] * 0.9}
    stats = observe(mlp, now, batches, kinds=("H", "cross"), float_params=params)
    x = np.concatenate([np.asarray(b).reshape(-1, N) for b in batches]).astype(np.float64)
    q, k = np.asarray(params["q"], np.float64), np.asarray(params["k"], np.float64)
    is_, was = np.tanh(x @ (0.9 * q) + x @ k), np.tanh(x @ q + x @ k)
    np.testing.assert_allclose(stats["out"].cross, (was - is_).T @ is_ / len(x), rtol=1e-3, atol=1e-5)
    assert not np.asarray(stats["q"].cross).any()
    with pytest.raises(UserError, match="give float_params"):
        observe(mlp, now, batches, kinds=("cross",))


def test_a_scanned_model_has_stacked_statistics(rng):
    stack = {"layers": jnp.asarray(rng.standard_normal((3, N, N)) / 5, jnp.float32)}

    def scanned(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])[0]

    x = jnp.asarray(rng.standard_normal((40, N)), jnp.float32)
    s = observe(scanned, stack, [x])["layers"]
    assert s.H.shape == (3, N, N) and s.count.shape == (3,)
    for i in range(3):
        np.testing.assert_allclose(s.H[i], np.asarray(x.T @ x) / 40, rtol=1e-4, atol=1e-5)
        x = jnp.tanh(x @ stack["layers"][i])


def test_a_weight_used_twice_has_the_sums_of_both(rng):
    w = {"w": jnp.asarray(rng.standard_normal((N, N)) / 5, jnp.float32)}
    x = jnp.asarray(rng.standard_normal((10, N)), jnp.float32)
    s = observe(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], w, [x])["w"]
    both = np.concatenate([np.asarray(x), np.tanh(np.asarray(x @ w["w"]))])
    np.testing.assert_allclose(s.H, both.T @ both / 20, rtol=1e-3, atol=1e-4)
    assert float(s.count) == 20


def experts(params, x):
    """Two experts; tokens are routed by the sign of their first number."""
    to_first = (x[:, :1] > 0).astype(x.dtype)
    routed = jnp.stack([x * to_first, x * (1 - to_first)])
    return jnp.einsum("etn,eno->eto", routed, params["experts"]).sum(axis=0)


def test_experts_have_their_own_statistics_and_token_counts(rng):
    params = {"experts": jnp.asarray(rng.standard_normal((2, N, 4)), jnp.float32)}
    x = rng.standard_normal((50, N)).astype(np.float32)
    x[:, 0] = np.where(np.arange(50) < 3, 1.0, -1.0)
    s = observe(experts, params, [jnp.asarray(x)])["experts"]
    assert s.count.tolist() == [3, 47]
    np.testing.assert_allclose(s.H[0], x[:3].T @ x[:3] / 3, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(s.H[1], x[3:].T @ x[3:] / 47, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"experts \(entry \(.*0.*,\) of its stack\): no calibration token"):
        observe(experts, params, [jnp.asarray(x[3:])])


def test_eight_devices_give_the_sums_of_one(params, rng):
    x = jnp.asarray(rng.standard_normal((16, 7, N)), jnp.float32)
    one = observe(mlp, params, [x])
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert len(mesh.devices) == 8
    eight = observe(mlp, params, [jax.device_put(x, NamedSharding(mesh, P("data")))])
    for name in one:
        np.testing.assert_allclose(one[name].H, eight[name].H, rtol=1e-5, atol=1e-6)


def test_flaws_are_named(params, batches):
    with pytest.raises(UserError, match="no batches"):
        observe(mlp, params, [])
    with pytest.raises(UserError, match="unknown statistic 'G'; there are H, h"):
        observe(mlp, params, batches, kinds=("G",))
    with pytest.raises(UserError, match="q: its input has NaN or Inf"):
        observe(mlp, params, [batches[0].at[1, 2, 3].set(jnp.nan)])
    with pytest.raises(UserError, match="q: no calibration token reached it"):
        observe(mlp, params, [jnp.zeros_like(batches[0])])


def test_the_second_batch_compiles_nothing(params, batches):
    from qjax.calibrate.observe import _pass

    observe(mlp, params, batches[:1])
    before = _pass._cache_size()
    observe(mlp, params, batches)
    assert _pass._cache_size() == before


def test_saved_statistics_come_back(params, batches, tmp_path):
    stats = observe(mlp, params, batches, kinds=("H", "absmax"))
    alone = dataclasses.replace(stats["q"], G=jnp.eye(4)[None])
    save_stats(tmp_path / "G.npz", {"q": alone})
    np.testing.assert_array_equal(load_stats(tmp_path / "G.npz")["q"].G, alone.G)
    save_stats(tmp_path / "stats.npz", stats)
    back = load_stats(tmp_path / "stats.npz")
    assert set(back) == set(stats) and back["q"] is back["k"]
    for name in stats:
        np.testing.assert_array_equal(back[name].H, stats[name].H)
        np.testing.assert_array_equal(back[name].absmax, stats[name].absmax)
        assert float(back[name].count) == float(stats[name].count) and back[name].h is None
    with pytest.raises(UserError, match="no such file"):
        load_stats(tmp_path / "none.npz")
    whole = (tmp_path / "stats.npz").read_bytes()
    for raw in (b"not a zip", whole[:-30], whole[: len(whole) // 2], whole.replace(b"NUMPY", b"\xffUMPY"), b""):
        (tmp_path / "other.npz").write_bytes(raw)
        with pytest.raises(UserError, match=r"other\.npz: not a readable \.npz file: ."):
            load_stats(tmp_path / "other.npz")


@pytest.mark.parametrize("arrays", [
    {}, {"shared": "[1]"}, {"shared": '{"q": ["q"]}'}, {"shared": '{"q": 3}', "q": "x"}, {"shared": "[" * 100_000},
    {"shared": '{"q": "q"}', "q|shape": np.ones(3)}, {"shared": '{"q": "q"}', "q|h": np.array(["a"])},
    {"shared": '{"q": "q"}', "k|h": np.ones(3)}, {"shared": "{", "q|h": np.ones(3)},
])  # fmt: skip
def test_a_file_of_other_arrays_is_said_to_hold_no_statistics(arrays, tmp_path):
    arrays = {k: np.frombuffer(a.encode(), np.uint8) if isinstance(a, str) else a for k, a in arrays.items()}
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(UserError, match=r"other\.npz holds no statistics that qjax wrote"):
        load_stats(tmp_path / "other.npz")


def test_a_single_array_is_no_statistics(tmp_path):
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(UserError, match=r"one\.npy: not a readable"):
        load_stats(tmp_path / "one.npy")


def test_public_name():
    assert qjax.observe is observe


@pytest.mark.parametrize("layers_outside", [True, False])
@pytest.mark.parametrize("batches", [1, 2])
def test_a_weight_that_the_steps_of_a_scan_share_has_their_sums(rng, layers_outside, batches):
    """Four layers, four steps, so that lengths cannot tell which scan is which; stacked by layer, summed over steps."""
    params = {"layers": jnp.asarray(rng.standard_normal((4, N, N)) / 5, jnp.float32), "all": jnp.eye(N)}
    xs = [jnp.asarray(rng.standard_normal((4, 6, N)), jnp.float32) for _ in range(batches)]

    def step(h, w, shared):
        return jnp.tanh(h @ w) @ shared

    def outside(params, x):
        return jax.lax.scan(
            lambda x, w: (jax.lax.map(lambda t: step(t, w, params["all"]), x), None), x, params["layers"]
        )[0]

    def inside(params, x):
        return jax.lax.map(
            lambda t: jax.lax.scan(lambda t, w: (step(t, w, params["all"]), None), t, params["layers"])[0], x
        )

    kinds = ("H", "h", "absmean", "absmax", "samples")
    stats = observe(outside if layers_outside else inside, params, xs, kinds)
    x = np.stack(xs).reshape(-1, N)
    both = []
    for i in range(4):
        both.append(x)
        x = np.tanh(x @ np.asarray(params["layers"][i]))
    tanh = np.concatenate([*both[1:], x])
    for s, seen in ((jax.tree.map(lambda a: a[2], stats["layers"]), both[2]), (stats["all"], tanh)):
        np.testing.assert_allclose(s.H, seen.T @ seen / len(seen), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(s.h, (seen**2).mean(0), rtol=1e-3)
        np.testing.assert_allclose(s.absmean, np.abs(seen).mean(0), rtol=1e-3)
        np.testing.assert_allclose(s.absmax, np.abs(seen).max(0), rtol=1e-4)
        assert float(s.count) == len(seen)
        norms = np.sort(np.linalg.norm(seen, axis=1))
        kept = np.sort(np.linalg.norm(np.asarray(s.samples), axis=1))[-len(seen) :]
        np.testing.assert_allclose(kept, norms, rtol=1e-4)


def test_a_stack_of_several_axes_is_stacked_as_it_lies(rng):
    """One scan over the merged axes of a stack [2, 3], and two scans over the halves of a stack [6]."""
    x = jnp.asarray(rng.standard_normal((9, N)), jnp.float32)
    flat = {"w": jnp.asarray(rng.standard_normal((6, N, N)) / 5, jnp.float32)}
    nested = {"w": flat["w"].reshape(2, 3, N, N)}

    def over(ws, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    plain = observe(lambda p, x: over(p["w"], x), flat, [x])["w"]
    merged = observe(lambda p, x: over(p["w"].reshape(6, N, N), x), nested, [x])["w"]
    split = observe(lambda p, x: jax.lax.scan(lambda x, ws: (over(ws, x), None), x, p["w"].reshape(2, 3, N, N))[0],
                    flat, [x])["w"]  # fmt: skip
    assert merged.H.shape == (2, 3, N, N) and split.H.shape == plain.H.shape == (6, N, N)
    np.testing.assert_allclose(merged.H.reshape(plain.H.shape), plain.H, rtol=1e-5)
    np.testing.assert_allclose(split.H, plain.H, rtol=1e-5)
    with pytest.raises(UserError, match=r"w: a scan steps over a part of its stack of \[6\]"):
        observe(lambda p, x: over(p["w"][:4], x), flat, [x])


def test_cross_under_a_scan_that_shares_the_weight(rng):
    params = {"w": jnp.asarray(rng.standard_normal((N, N)) / 5, jnp.float32)}
    now = {"w": 0.9 * params["w"]}
    x = jnp.asarray(rng.standard_normal((7, N)), jnp.float32)

    def recur(p, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=3)[0]

    def states(w):
        h = [np.asarray(x)]
        for _ in range(2):
            h.append(np.tanh(h[-1] @ np.asarray(w)))
        return np.concatenate(h)

    is_, was = states(now["w"]), states(params["w"])
    got = observe(recur, now, [x], kinds=("H", "cross"), float_params=params)["w"]
    np.testing.assert_allclose(got.cross, (was - is_).T @ is_ / len(is_), rtol=1e-3, atol=1e-4)
    assert float(got.count) == 21
