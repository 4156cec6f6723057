"""Models that qjax has never seen, written as plain functions: a small BERT, and LSTM layers under two scans.

observe -> contracted_axes -> quantize_params -> lift, with every weight accounted for.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_walks import second_moment

import qjax
from qjax.errors import UserError
from qjax.plan import Plan, Rule

D, HIDDEN, VOCAB, LAYERS = 64, 128, 96, 2
RECIPE = "nearest('h') >> ldlq() >> descend(2) >> refit(1)"


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape) / shape[-1] ** 0.5, jnp.float32)


# --- an encoder -------------------------------------------------------------------------------------------------------


def bert_params(rng):
    def norm():
        return {"gain": 1 + 0.1 * normal(rng, D), "bias": normal(rng, D)}

    def layer():
        attention = {k: {"w": normal(rng, D, D), "b": 0.1 * normal(rng, D)} for k in "qkvo"}
        mlp = {"up": normal(rng, D, HIDDEN), "up_b": normal(rng, HIDDEN), "down": normal(rng, HIDDEN, D)}
        return {"attention": attention, "norm_1": norm(), "mlp": mlp, "norm_2": norm()}

    return {
        "tokens": D**0.5 * normal(rng, VOCAB, D),
        "positions": normal(rng, 32, D),
        "norm": norm(),
        "layers": [layer() for _ in range(LAYERS)],
        "pooler": normal(rng, D, D),
        "classifier": {"w": normal(rng, D, 8), "b": normal(rng, 8)},
    }


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["gain"][None, None] + p["bias"][None, None]


def bert(params, ids):
    """Logits f32[b, 8] of token ids i32[b, t]; rows end in padding, id 0, which nobody looks at."""
    b, t = ids.shape
    x = layer_norm(params["norm"], params["tokens"][ids] + params["positions"][None, :t])
    for p in params["layers"]:
        a = p["attention"]
        q, k, v = ((x @ a[n]["w"] + a[n]["b"][None, None]).reshape(b, t, 4, D // 4) for n in "qkv")
        scores = jnp.einsum("bihd,bjhd->bhij", q, k) / (D // 4) ** 0.5
        scores = jnp.where((ids != 0)[:, None, None, :], scores, -1e9)
        y = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores), v).reshape(b, t, D)
        x = layer_norm(p["norm_1"], x + y @ a["o"]["w"] + a["o"]["b"][None, None])
        y = jax.nn.gelu(x @ p["mlp"]["up"] + p["mlp"]["up_b"][None, None])
        x = layer_norm(p["norm_2"], x + y @ p["mlp"]["down"])
    return jnp.tanh(x[:, 0] @ params["pooler"]) @ params["classifier"]["w"] + params["classifier"]["b"][None]


BERT_PLAN = Plan((Rule("positions", "keep"), Rule("tokens", "rtn:Q8_0"), Rule("*", "Q4_0")))
BERT_AXES = {"tokens": -1, "pooler": -2, "classifier/w": -2} | {
    f"layers/{i}/{w}": -2 for i in range(LAYERS) for w in (*(f"attention/{n}/w" for n in "qkvo"), "mlp/up", "mlp/down")
}


# --- a recurrent net --------------------------------------------------------------------------------------------------


def lstm_params(rng):
    """Layers stacked; `input` is kept as rows (4h, in), `recurrent` as (h, 4h)."""
    return {
        "embedding": D**0.5 * normal(rng, VOCAB, D),
        "lstm": {
            "input": 2 * normal(rng, LAYERS, 4 * D, D),
            "recurrent": 4 * normal(rng, LAYERS, D, 4 * D),
            "bias": normal(rng, LAYERS, 4 * D),
        },
        "readout": normal(rng, D, VOCAB),
    }


def cell(p, h, c, x):
    gates = x @ p["input"].T + h @ p["recurrent"] + p["bias"][None]
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def lstm(params, ids):
    """Logits f32[b, t, vocab]: a scan over layers, and in each a scan over time."""
    zero = jnp.zeros((len(ids), D))

    def layer(x, p):
        def step(state, x):
            h, c = cell(p, *state, x)
            return (h, c), h

        return jax.lax.scan(step, (zero, zero), x)[1], None

    x = params["embedding"][ids].transpose(1, 0, 2)
    x = jax.lax.scan(layer, x, params["lstm"])[0]
    return x.transpose(1, 0, 2) @ params["readout"]


LSTM_PLAN = Plan((Rule("lstm/bias", "keep"), Rule("embedding", "rtn:Q8_0"), Rule("*", "Q4_0")))
LSTM_AXES = {"embedding": -1, "lstm/input": -1, "lstm/recurrent": -2, "readout": -2}

MODELS = {
    "bert": (bert, bert_params, BERT_PLAN, BERT_AXES, {"positions": "kept by rule 'positions'"}),
    "lstm": (lstm, lstm_params, LSTM_PLAN, LSTM_AXES, {"lstm/bias": "kept by rule 'lstm/bias'"}),
}


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    """(apply, params, batches, stats, qparams, report, axes, reasons to keep)."""
    apply, make, plan, axes, kept = MODELS[request.param]
    rng = np.random.default_rng(0)
    params = make(rng)
    batches = [jnp.asarray(rng.integers(1, VOCAB, (8, 16)).astype(np.int32)).at[:, 13:].set(0) for _ in range(3)]
    stats = qjax.observe(apply, params, batches)
    assert qjax.contracted_axes(apply, params, batches[0]) == axes
    qparams, report = qjax.quantize_params(params, plan, stats, recipe=RECIPE, axes=axes)
    return apply, params, batches, stats, qparams, report, axes, kept


def leaves_of(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=qjax.is_qtensor)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


@pytest.mark.slow
def test_every_leaf_is_accounted_for_once(made):
    _, params, _, _, qparams, report, axes, kept = made
    names = [t.name for t in report.tensors]
    assert names == list(leaves_of(params)) and len(set(names)) == len(names)
    packed = leaves_of(qparams)
    for t in report.tensors:
        leaf = packed[t.name]
        if t.name in axes:
            assert t.kept is None and qjax.is_qtensor(leaf) and leaf.axis == axes[t.name], t.name
            assert t.format == ("Q8_0" if t.name in ("tokens", "embedding") else "Q4_0")
            assert (t.calibration is None) == (t.format == "Q8_0") and t.error > 0
        else:
            assert t.kept == kept.get(t.name, "a vector") and leaf is leaves_of(params)[t.name]
    assert report.nbytes == sum(x.nbytes for x in jax.tree.leaves(qparams))


@pytest.mark.slow
def test_every_weight_is_better_than_nearest_where_it_counts(made):
    _, params, _, stats, qparams, report, axes, _ = made
    for t in report.tensors:
        if t.calibration is None:
            continue
        w, w_hat, H = leaves_of(params)[t.name], qjax.dequantize(leaves_of(qparams)[t.name]), stats[t.name].H
        plain = qjax.dequantize(qjax.quantize(w, "Q4_0", axis=axes[t.name]))
        rows, nearest, best = (np.moveaxis(np.asarray(a, np.float64), axes[t.name], -1) for a in (w, plain, w_hat))

        def loss(e, H=H, rows=rows):
            H = np.asarray(H, np.float64)
            return np.einsum("...ri,...ij,...rj->...", e, H, e) / np.einsum("...ri,...ij,...rj->...", rows, H, rows)

        assert (loss(rows - best) < loss(rows - nearest)).all(), t.name
        line = t.calibration
        assert line.loss == pytest.approx(loss(rows - best).mean(), rel=1e-3)
        assert line.loss < line.first_loss and line.heldout_loss is None
        assert line.tokens == int(np.min(np.asarray(stats[t.name].count)))


@pytest.mark.slow
def test_packed_equals_dequantized(made):
    apply, params, batches, _, qparams, _, _, _ = made
    dense = jax.tree.map(lambda x: qjax.dequantize(x) if qjax.is_qtensor(x) else x, qparams, is_leaf=qjax.is_qtensor)
    got, expected = qjax.lift(apply)(qparams, batches[0]), apply(dense, batches[0])
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(np.asarray(expected)).max())
    float_ = apply(params, batches[0])
    assert 0 < float(jnp.mean((expected - float_) ** 2)) < 0.1 * float(jnp.mean(float_**2))


def test_recurrent_weights_see_all_steps_of_their_layer():
    """Explicit loops over layers and time against the two scans."""
    rng = np.random.default_rng(1)
    params, ids = lstm_params(rng), jnp.asarray(rng.integers(1, VOCAB, (5, 7)).astype(np.int32))
    stats = qjax.observe(lstm, params, [ids, ids[:3, :4]], kinds=("H", "absmax"))
    seen = {"input": [[], []], "recurrent": [[], []]}
    for batch in (ids, ids[:3, :4]):
        x = list(params["embedding"][batch].transpose(1, 0, 2))
        for layer in range(LAYERS):
            p, h, c = jax.tree.map(lambda a: a[layer], params["lstm"]), jnp.zeros((len(batch), D)), 0.0 * x[0]  # noqa: B023
            for t, row in enumerate(x):
                seen["input"][layer].append(row)
                seen["recurrent"][layer].append(h)
                h, c = cell(p, h, c, row)
                x[t] = h
    assert stats["readout"].H.shape == (D, D) and float(stats["readout"].count) == 35 + 12
    for name, layers in seen.items():
        s = stats[f"lstm/{name}"]
        assert s.H.shape == (LAYERS, D, D) and s.absmax.shape == (LAYERS, D)
        for layer, rows in enumerate(map(np.concatenate, layers)):
            there = np.any(rows != 0, axis=1)  # the zero state before the first step is no token
            assert float(s.count[layer]) == there.sum()
            np.testing.assert_allclose(s.H[layer], second_moment(rows[there]), rtol=1e-3, atol=1e-6)
            np.testing.assert_allclose(s.absmax[layer], np.abs(rows).max(0), rtol=1e-4, atol=1e-6)


def test_what_cannot_be_calibrated_is_named():
    rng = np.random.default_rng(0)
    params, ids = bert_params(rng), jnp.ones((2, 8), jnp.int32)
    axes = qjax.contracted_axes(bert, params, ids)
    stats = qjax.observe(bert, params, [ids])
    assert "tokens" not in stats and "positions" not in stats
    with pytest.raises(UserError, match="tokens: the recipe needs the statistic 'H'"):
        qjax.quantize_params(
            params, Plan((Rule("positions", "keep"), Rule("*", "Q4_0"))), stats, recipe="gptq", axes=axes
        )
    square = {"w": normal(rng, D, D)}
    with pytest.raises(UserError, match=r"w: contracted along .* keep it in the plan"):
        qjax.contracted_axes(lambda p, x: x @ p["w"] @ p["w"].T, square, jnp.ones((2, D)))
