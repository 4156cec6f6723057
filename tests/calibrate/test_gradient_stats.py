"""Curvatures by gradients: closed forms in float64, sampled labels, and the recipes that round in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate import guided, kronecker, load_stats, own_labels, save_stats
from qjax.calibrate.gradients import _step
from qjax.errors import UserError
from qjax.rounding.curvature import two_sided_loss
from qjax.stats import Stats

S, T, N, M, V = 6, 5, 8, 12, 7


def model(params, x):
    """Two matrices, (in, out) and (out, in), a product between."""
    return jnp.tanh(x @ params["a"]) @ params["b"].T


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=(N, M)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(V, M)), jnp.float32),
    }


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(1).normal(size=(S, T, N)) * np.geomspace(2, 0.2, N), jnp.float32)


def squares(key, out):
    """A loss without chance, whose gradient is `out` itself."""
    return 0.5 * jnp.sum(out * out)


def pairs64(params, x):
    """(x, g) of a and of b, sequence by sequence, for `squares`."""
    a, b, x = (np.asarray(v, np.float64) for v in (params["a"], params["b"], x))
    h = np.tanh(x @ a)
    y = h @ b.T
    back = (y @ b) * (1 - h * h)
    return {"a": list(zip(x, back, strict=True)), "b": list(zip(h, y, strict=True))}


def reference(pairs, sketch, rounds):
    samples = []
    for x, g in pairs:
        samples += [g.T @ x] if sketch == "B" else [np.outer(v, u) for u, v in zip(x, g, strict=True)]
    H_O, H_I = np.eye(samples[0].shape[0]), np.eye(samples[0].shape[1])
    for _ in range(rounds):
        new_I = np.mean([G.T @ H_O @ G for G in samples], axis=0) / (H_O**2).sum()
        new_O = np.mean([G @ H_I @ G.T for G in samples], axis=0) / (H_I**2).sum()
        H_O, H_I = new_O, new_I
    return H_O, H_I, samples


@pytest.mark.parametrize(("sketch", "rounds"), [("B", 1), ("A", 3)])
def test_both_sketches_are_those_of_float64(params, x, sketch, rounds):
    found = kronecker(model, params, [x[:4], x[4:]], jax.random.key(0), sketch=sketch, rounds=rounds, loss=squares)
    count = _step._cache_size()
    kronecker(model, params, [2 * x[:4], x[4:]], jax.random.key(1), sketch=sketch, rounds=rounds + 1, loss=squares)
    assert _step._cache_size() == count, "a second compilation"
    assert found["a"].axis == -2 and found["b"].axis == -1 and float(found["a"].count) == S * T
    for path, pairs in pairs64(params, x).items():
        H_O, H_I, samples = reference(pairs, sketch, rounds)
        np.testing.assert_allclose(found[path].H, H_I, rtol=2e-4, atol=1e-6 * np.abs(H_I).max())
        np.testing.assert_allclose(found[path].G[0], H_O, rtol=2e-4, atol=1e-6 * np.abs(H_O).max())
        if rounds > 1:  # power iterations reach the nearest Kronecker product: the first singular pair
            F = np.mean([np.einsum("ij,kl->ikjl", G, G) for G in samples], axis=0).reshape(len(H_O) ** 2, -1)
            u, _, v = np.linalg.svd(F)
            for mine, best in ((H_O, u[:, 0]), (H_I, v[0])):
                assert abs((mine.ravel() / np.linalg.norm(mine)) @ best) > 0.99


def test_labels_are_the_models_own():
    """The mean over labels of the gradient's square is Fisher's information diag(p) - p p^T."""
    z = jnp.asarray([[0.3, -1.0, 1.2]])
    g = jax.vmap(lambda k: jax.grad(lambda z: own_labels(k, z))(z)[0])(jax.random.split(jax.random.key(0), 20_000))
    p = np.asarray(jax.nn.softmax(z[0]), np.float64)
    np.testing.assert_allclose(np.asarray(g.T @ g, np.float64) / len(g), np.diag(p) - np.outer(p, p), atol=0.01)


def test_h_of_row_groups(params, x, tmp_path):
    found = guided(model, params, [x], jax.random.key(0), groups=3, paths=["a"], loss=squares)
    assert list(found) == ["a"]
    for k in range(3):
        want = sum(
            (u * (np.square(g[:, 4 * k : 4 * k + 4]).mean(axis=1))[:, None]).T @ u for u, g in pairs64(params, x)["a"]
        )
        np.testing.assert_allclose(found["a"].H[k], want / (S * T), rtol=2e-4, atol=1e-7)
    save_stats(tmp_path / "s.npz", found)
    np.testing.assert_array_equal(load_stats(tmp_path / "s.npz")["a"].H, found["a"].H)


def test_recipes_round_in_what_was_found():
    """A quadratic loss: what each recipe minimizes is what is lost, beside plain GPTQ in E[x x^T]."""
    rng = np.random.default_rng(3)
    w = jnp.asarray(rng.normal(size=(64, 96)), jnp.float32)
    mix = jnp.asarray(rng.normal(size=(96, 96)) * np.geomspace(2, 0.1, 96), jnp.float32)
    x = jnp.asarray(rng.normal(size=(64, 32, 64)) @ (rng.normal(size=(64, 64)) * np.geomspace(2, 0.1, 64)), jnp.float32)

    def model(params, x):
        return (x @ params["w"]) @ mix

    def draw(key, out):
        return jnp.sum(out * jax.random.normal(key, out.shape))  # E[g g^T] = mix mix^T at the output of w

    stats = kronecker(model, {"w": w}, [x], jax.random.key(0), sketch="A", loss=draw)
    plain = qjax.observe(model, {"w": w}, [x])
    exact = jnp.matmul(mix, mix.T, precision="highest")[None]
    lost = {}
    for recipe, seen in (("yaqa", stats), ("gptq", plain)):
        q, _ = qjax.quantize_params({"w": w}, "int4_g64", seen, recipe=recipe)
        e = (w - qjax.dequantize(q["w"])).T
        lost[recipe] = float(two_sided_loss(e, plain["w"].H, exact))
    assert lost["yaqa"] < 0.7 * lost["gptq"]


def test_each_group_of_rows_is_rounded_in_its_own_h():
    """The same as four weights of their own; a format that ties rows takes the mean, and the report says so."""
    rng = np.random.default_rng(4)
    w = jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)
    H = jnp.stack([jnp.asarray((v := rng.normal(size=(200, 64)) * rng.lognormal(0, 1, 64)).T @ v / 200, jnp.float32)
                   for _ in range(4)])  # fmt: skip
    made = qjax.recipe("guided")
    q, _ = qjax.quantize_params({"w": w}, "int4_g64", {"w": Stats(H=H)}, recipe=made, axes={"w": -1})
    alone = [
        qjax.quantize_params(
            {"w": w[8 * k : 8 * k + 8]},
            "int4_g64",
            {"w": Stats(H=H[k])},
            recipe="nearest('h') >> ldlq() >> descend(4)",
            axes={"w": -1},
        )[0]["w"]
        for k in range(4)
    ]
    np.testing.assert_array_equal(qjax.dequantize(q["w"]), jnp.concatenate([qjax.dequantize(a) for a in alone]))
    tied, report = qjax.quantize_params({"w": w}, "FP8_E4M3_tensor", {"w": Stats(H=H)}, recipe=made, axes={"w": -1})
    mean = qjax.quantize_params(
        {"w": w}, "FP8_E4M3_tensor", {"w": Stats(H=H.mean(axis=0))}, recipe=made, axes={"w": -1}
    )
    np.testing.assert_array_equal(qjax.dequantize(tied["w"]), qjax.dequantize(mean[0]["w"]))
    notes = [r.tensors[0].calibration.note for r in (report, mean[1])]
    assert notes == [
        "one H for all rows: FP8_E4M3_tensor holds rows together",
        "one H for all rows: it was not collected for groups of them",
    ]


def test_what_cannot_be_looked_at_is_named(params, x, without_type_checks):
    key = jax.random.key(0)
    for call, message in (
        (lambda: kronecker(model, params, [], key), "no batches"),
        (lambda: kronecker(model, params, [x], key, paths=["c"]), "'c' is not one matrix .* those are a, b"),
        (lambda: kronecker(model, params, [x], key, sketch="C"), "sketch is A or B"),
        (lambda: guided(model, params, [x], key, groups=5), "a: 12 rows are no 5 groups"),
        (lambda: kronecker(model, params, [x], key, loss=lambda k, out: 0.0 * jnp.sum(out)), "a: there is no gradient"),
        (lambda: kronecker(model, params, [x / 0], key), "a: there is a gradient or an input that is NaN"),
        (
            lambda: qjax.recipe("guided >> options(two_sided=8)"),
            "guided=4 rounds groups of rows apart, and two_sided=8",
        ),
        (lambda: qjax.recipe("hadamard() >> guided"), "guided=4 .* hadamard"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    w, H = params["b"], jnp.stack([jnp.eye(M)] * 7)
    for recipe, message in (("gptq", "H is of 7 groups of rows, and only"), ("guided", "the recipe is guided=4")):
        with pytest.raises(UserError, match=f"b: .*{message}"):
            qjax.quantize_params({"b": w}, "int4_row", {"b": Stats(H=H)}, recipe=recipe, axes={"b": -1})
