"""LoftQ against the same alternation in float64 numpy, on Gaussian and on real weights."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_arrays import f64, normal

import qjax
from qjax.errors import UserError
from qjax.formats.integer import affine
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.plan import Plan, Rule
from qjax.rounding import ldlq, nearest, round_weight
from qjax.stats import Stats
from qjax.tensor import QTensor
from qjax.training.adapters.loftq import loftq, loftq_params
from qjax.training.adapters.lora import apply_adapted

INT2 = affine(2, 64, symmetric=True, levels="mid-rise")


def total(q, m):
    """Q + A B, arranged as kernels."""
    base = f64(qjax.dequantize(q))
    return (base if q.axis == -2 else base.swapaxes(-1, -2)) + m.scale * f64(m.a) @ f64(m.b)


def error(w, q, m):
    return np.linalg.norm(f64(w) - total(q, m))


def int2_numpy(w):
    """INT2 on the columns of a kernel, written down anew: s = f16(absmax / 1.5), levels +-1/2 and +-3/2."""
    x = w.T.reshape(w.shape[1], -1, 64)
    s = (np.abs(x).max(-1, keepdims=True) / 1.5).astype(np.float16).astype(np.float64)
    level = np.clip(np.floor(x / s), -2, 1) + 0.5
    return (s * level).reshape(w.shape[1], -1).T


def alternation_numpy(w, rank, rounds):
    """The errors of all rounds, |W - Q_t - A_t B_t|."""
    low, errors = np.zeros_like(w), []
    for _ in range(rounds):
        q = int2_numpy(w - low)
        u, s, vt = np.linalg.svd(w - q, full_matrices=False)
        low = u[:, :rank] * s[:rank] @ vt[:rank]
        errors.append(np.linalg.norm(w - q - low))
    return errors


@pytest.fixture(scope="module")
def attention(shared_data):
    with np.load(shared_data / "models" / "gpt2-attention" / "layer11.npz") as file:
        return {k: jnp.asarray(file[f"attn.{k}.weight"][:, :256]) for k in ("q", "proj")}


def test_rounds_follow_the_algorithm_in_float64():
    w = normal(0, 128, 96)
    errors = alternation_numpy(f64(w), 16, 5)
    for rounds in (1, 2, 5):
        q, m = loftq(w, INT2, rank=16, rounds=rounds)
        assert error(w, q, m) == pytest.approx(min(errors[:rounds]), rel=1e-5 if rounds == 1 else 5e-3)
    assert (q.shape, q.axis, m.a.shape, m.b.shape, m.scale) == ((128, 96), -2, (128, 16), (16, 96), 1.0)
    assert np.array_equal(qjax.dequantize(loftq(w, INT2, rank=16, rounds=1)[0]), int2_numpy(f64(w)).astype(np.float32))


def test_one_round_is_the_best_low_rank_part_of_the_residual():
    w = normal(0, 128, 96)
    q, m = loftq(w, "NF4", rank=16, rounds=1)
    left = f64(w) - f64(qjax.dequantize(qjax.quantize(w, "NF4", axis=0)))
    u, s, vt = np.linalg.svd(left, full_matrices=False)
    np.testing.assert_allclose(f64(m.a) @ f64(m.b), u[:, :16] * s[:16] @ vt[:16], atol=1e-4)
    assert error(w, q, m) == pytest.approx(np.sqrt(np.sum(s[16:] ** 2)), rel=1e-4)
    for gram in (f64(m.a).T @ f64(m.a), f64(m.b) @ f64(m.b).T):  # the singular values, split evenly
        np.testing.assert_allclose(gram, np.diag(s[:16]), atol=1e-4)


def test_the_best_round_comes_back():
    """On this format and weight the alternation soon overshoots: the last round is worse than the first."""
    w = normal(3, 64, 64)
    errors = alternation_numpy(f64(w), 8, 12)
    assert 0 < np.argmin(errors) < 5 and errors[-1] > 1.02 * errors[0]
    found = [error(w, *loftq(w, INT2, rank=8, rounds=t)) for t in (1, 2, 5, 12)]
    assert found[-1] == pytest.approx(min(errors), rel=5e-3)
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(found))


@pytest.mark.slow
def test_two_bits_on_gaussian_weights():
    w = normal(0, 256, 256)
    none, one, five = three_errors(w, "int2_g64_mid_mse", 64)
    print(f"Gaussian, 2 bits, rank 64: none {none:.4f}, SVD of the residual {one:.4f}, LoftQ {five:.4f}")
    assert five < 0.97 * one and one < 0.8 * none


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q", "proj"])
def test_two_bits_on_real_weights(attention, name):
    none, one, five = three_errors(attention[name], "int2_g64_mid_mse", 64)
    print(f"{name}, 2 bits, rank 64: none {none:.4f}, SVD of the residual {one:.4f}, LoftQ {five:.4f}")
    assert five < 0.95 * one and one < 0.9 * none


def three_errors(w, format, rank):
    """Relative errors of plain quantization, of T = 1 and of T = 5."""
    none = np.linalg.norm(f64(w) - f64(qjax.dequantize(qjax.quantize(w, format, axis=0))))
    found = [error(w, *loftq(w, format, rank=rank, rounds=t)) for t in (1, 5)]
    return [e / np.linalg.norm(f64(w)) for e in (none, *found)]


@pytest.mark.slow
def test_rows_jit_vmap_and_stacks_agree():
    w = normal(0, 3, 128, 64)
    alone = [loftq(one, "NF4_dq", rank=8, rounds=2) for one in w]
    q, m = loftq(w, "NF4_dq", rank=8, rounds=2)
    assert (q.shape, q.axis, m.a.shape, m.b.shape) == (w.shape, -2, (3, 128, 8), (3, 8, 64))
    mapped = jax.vmap(lambda w: loftq(w, "NF4_dq", rank=8, rounds=2))(w)
    jitted = jax.jit(lambda w: loftq(w, "NF4_dq", rank=8, rounds=2))(w[0])
    rows = loftq(w[0].T, "NF4_dq", axis=-1, rank=8, rounds=2)
    assert rows[0].axis == -1 and rows[1].a.shape == (128, 8)
    for i, (q1, m1) in enumerate(alone):
        want = error(w[i], q1, m1)
        assert np.linalg.norm(f64(w[i]) - total(q, m)[i]) == pytest.approx(want, rel=1e-3)
        assert np.linalg.norm(f64(w[i]) - total(*mapped)[i]) == pytest.approx(want, rel=1e-3)
    for pair in (jitted, rows):
        assert error(w[0], *pair) == pytest.approx(error(w[0], *alone[0]), rel=1e-3)


def test_any_rounding_may_be_the_quantizer():
    """Error feedback on an H: its output error stays below that of nearest rounding, adapters included."""
    w, x = normal(0, 64, 48), normal(1, 512, 64) @ normal(2, 64, 64, size=0.3)
    H = x.T @ x / 512

    def gptq(w):
        made = round_weight(w.T, INT2, (nearest(), ldlq()), Stats(H=H))
        return QTensor(INT2.pack(made.scales, made.codes), INT2, -2)

    def loss(q, m):
        e = f64(w) - total(q, m)
        return np.trace(e.T @ f64(H) @ e)

    assert loss(*loftq(w, INT2, rank=4, rounds=2, quantizer=gptq)) < 0.9 * loss(*loftq(w, INT2, rank=4, rounds=2))


@pytest.mark.slow
def test_a_model_starts_nearer_to_its_float_self():
    config = DecoderConfig(vocab=64, dim=64, hidden=128, layers=1, heads=4, kv_heads=2, head_dim=16)
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    plan = Plan((Rule("embed/embedding", "Q8_0"), Rule("head/kernel", "keep"), Rule("*", INT2)))
    base, adapters = loftq_params(params, plan, rank=16, rounds=2)
    layer = base["layers_0"]
    assert len(adapters) == 7 and all(path.startswith("layers_0/") for path in adapters)
    assert base["embed"]["embedding"].format.name == "Q8_0" and base["embed"]["embedding"].axis == -1
    assert base["head"]["kernel"] is params["head"]["kernel"] and layer["mlp_norm"] == params["layers_0"]["mlp_norm"]
    q, m = loftq(params["layers_0"]["mlp"]["up"]["kernel"], INT2, rank=16, rounds=2)
    assert np.array_equal(qjax.dequantize(q), qjax.dequantize(layer["mlp"]["up"]["kernel"]))
    assert np.array_equal(m.a, adapters["layers_0/mlp/up/kernel"].a)

    def apply(p, tokens):
        return model.apply({"params": p}, tokens)

    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    want = f64(jax.jit(apply)(params, tokens))
    plain, _ = qjax.quantize_params(params, plan)
    off = np.linalg.norm(f64(jax.jit(qjax.lift(apply))(plain, tokens)) - want)
    got = np.linalg.norm(f64(jax.jit(lambda p, m: apply_adapted(apply, p, m, tokens))(base, adapters)) - want)
    assert got < 0.75 * off


def test_a_table_of_formats_and_what_it_refuses():
    params = {"layers_0": {"kernel": normal(0, 64, 32)}, "head": {"kernel": normal(1, 64, 32)}}
    base, adapters = loftq_params(params, {"layers_0/kernel": ("Q4_0", -2)}, rank=4)
    assert list(adapters) == ["layers_0/kernel"] and base["head"]["kernel"] is params["head"]["kernel"]
    both = {"layers_0/kernel": ("Q4_0", 0), "head/kernel": (INT2, -2)}
    base, adapters = loftq_params(params, both, rank=4, rounds=1, patterns=("head/kernel",))
    assert list(adapters) == ["head/kernel"] and base["layers_0"]["kernel"].format.name == "Q4_0"
    with pytest.raises(UserError, match="no weight is called 'tail'"):
        loftq_params(params, {"tail": ("Q4_0", -2)}, rank=4)
    with pytest.raises(UserError, match="head/kernel is packed already"):
        loftq_params(base, {"head/kernel": ("Q4_0", -2)}, rank=4)
    with pytest.raises(UserError, match="layers_0/kernel: loftq: rank 33 does not fit 64 x 32"):
        loftq_params(params, {"layers_0/kernel": ("Q4_0", -2)}, rank=33)
    with pytest.raises(UserError, match="layers_0/kernel a recipe"):
        loftq_params(params, Plan((Rule("head/*", "keep"), Rule("*", "hqq:uint4_g32"))), rank=4)


def test_mistakes_are_named():
    w = normal(0, 64, 32)
    for change, message in (
        ({"rank": 0}, "rank 0 does not fit 64 x 32"),
        ({"rounds": 0}, "at least one round"),
        ({"axis": -3}, "axis must be one of the last two"),
        ({"format": "Q4_K"}, "multiple of 256"),
        ({"quantizer": lambda w: w}, "must return its QTensor"),
        ({"w": w.at[0, 0].set(jnp.nan)}, "1 of 2048 weights are NaN"),
        ({"w": np.zeros(32, np.float32)}, "needs a matrix"),
    ):
        with pytest.raises(UserError, match=message):
            loftq(**({"w": w, "format": "Q4_0", "rank": 4, "rounds": 1} | change))
