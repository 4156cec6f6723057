"""Tuning behind fixed codes: exact storing, gradients, a falling KL, the guard; block by block, resumed to the byte."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model
from qjax.pipeline import Calibration, quantize_model
from qjax.plan import Plan
from qjax.reparam.inputs import RoundedInput
from qjax.reparam.rotate import Rotated
from qjax.reparam.scale import Scaled
from qjax.reparam.split import LowRank
from qjax.training.grid.weights import leaves_by_path
from qjax.training.tuning import continuous
from qjax.training.tuning.blocks import TuneBlocks
from qjax.training.tuning.descent import Tuning, descend
from qjax.training.tuning.end_to_end import tune

CONFIG = DecoderConfig(
    vocab=64, dim=64, hidden=64, layers=2, heads=2, kv_heads=2, head_dim=32, context=64, tied=True
)  # fmt: skip
PLAN = Plan.from_dict({"rules": {"layers_*": "uint2_g64", "*": "Q8_0"}})


@pytest.fixture(scope="module")
def model():
    return Model(CONFIG, Decoder(CONFIG).init(jax.random.key(1), jnp.zeros((1, 8), jnp.int32))["params"])


@pytest.fixture(scope="module")
def calibration():
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, (20, 24)).astype(np.int32)
    return Calibration(tokens, heldout=4, batch=4)


@pytest.fixture(scope="module")
def rounded(model):
    return dataclasses.replace(model, params=qjax.quantize_params(model.params, PLAN)[0])


def weight(format, *applied):
    """16 rows, behind changes of variables."""
    q = qjax.quantize(jax.random.normal(jax.random.key(0), (16, 256)) / 16, format)
    return dataclasses.replace(q, applied=applied)


def same(a, b):
    return all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


BEHIND = (
    LowRank(jnp.ones((16, 2), jnp.float16) / 7, jnp.ones((2, 256), jnp.float16) / 7),
    Rotated(jnp.uint32(3), side="in"),
    Scaled(jnp.linspace(0.5, 2, 256)),
)
CASES = {
    "Q4_0": {"d"}, "Q2_K": {"d", "dmin", "mn", "sc"}, "uint2_g64": {"scale", "zero"}, "E8P_2": {"scale"},
    "trellis2_L12_3inst": {"scale"}, "lut2": {"table"}, "aqlm_1x4_g8": {"scale", "books"},
    "NF4_dq": {"nested_absmax", "offset"}, "IQ2_XS": {"d"}, "NVFP4": {"d"},
    "uint3_g16_bilevel3x16": {"scale", "scale_low", "scale_step", "zero", "zero_low", "zero_step"},
    "int4_g32": {"scale", "applied_0.A", "applied_0.B", "applied_2.s"},
}  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize("format", CASES)
def test_what_moves_is_stored_by_the_format_itself(format):
    """At the start it is the rounded weight, bit for bit; anywhere, what trains is what is stored, and codes stay."""
    q = weight(format, *(BEHIND if format == "int4_g32" else ()))
    zeros = continuous.start({"w": q})
    assert set(zeros["scales"]["w"]) == CASES[format]
    assert same(continuous.stored({"w": q}, zeros)["w"], q)
    p = jax.tree.map(lambda x: 0.2 * jax.random.normal(jax.random.key(2), x.shape), zeros)
    new = continuous.stored({"w": q}, p)["w"]
    assert jax.tree.structure(new) == jax.tree.structure(q) and new.nbytes == q.nbytes
    assert same(q.format.unpack(new.leaves)[1], q.format.unpack(q.leaves)[1])
    assert not same(new, q)
    trained = jax.jit(continuous.values)({"w": q}, p)["w"]
    np.testing.assert_allclose(trained, qjax.dequantize(new), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("format", ["int4_g128_f32", "NF4"])
def test_the_gradient_is_that_of_finite_differences(format):
    """Where numbers are stored as float32, nothing is passed straight through."""
    q, g = weight(format), jax.random.normal(jax.random.key(3), (16, 256))
    zeros = continuous.start({"w": q})["scales"]["w"]

    def loss(t):
        w = continuous.value(q, {k: t * jnp.cos(jnp.arange(x.size).reshape(x.shape)) for k, x in zeros.items()})
        return jnp.sum(w * g) + 10 * jnp.sum(w * w)

    slope, step = jax.jit(jax.grad(loss))(0.1), 1e-2
    assert float(slope) == pytest.approx(float(loss(0.1 + step) - loss(0.1 - step)) / (2 * step), rel=5e-3)


def test_a_k_quants_integers_move_to_the_next():
    q = weight("Q3_K")
    p = continuous.start({"w": q})
    p["scales"]["w"]["sc"] += jnp.float32(0.2)
    before, after = (q.format.unpack(t.leaves)[0] for t in (q, continuous.stored({"w": q}, p)["w"]))
    assert same(before["d"], after["d"])
    np.testing.assert_array_equal(after["sc"], np.clip(np.round(np.asarray(before["sc"]) * np.exp(0.2)), -32, 31))


def test_end_to_end_the_kl_falls_and_codes_stay(model, rounded, calibration):
    steps = []
    tuned, found = tune(
        model, rounded, calibration, Tuning(24, batch=8, rate=2e-2), progress=lambda *a: steps.append(a)
    )
    assert found.loss < 0.9 * found.first_loss and found.kept > 0 and found.broken is None
    assert len(steps) == 24 and len(found.losses) == 11 and "kept: held out" in str(found)
    before, after = leaves_by_path(rounded.params), leaves_by_path(tuned.params)
    for path, q in before.items():
        if qjax.is_qtensor(q):
            assert same(q.leaves.get("codes", ()), after[path].leaves.get("codes", ()))
    assert not same(before["layers_0/attn_norm/scale"], after["layers_0/attn_norm/scale"])
    held = calibration.tokens[calibration.used :, :-1]
    assert found.loss == pytest.approx(kl(model, tuned, held), rel=1e-4)
    assert found.first_loss == pytest.approx(kl(model, rounded, held), rel=1e-4)


def kl(model, other, tokens):
    """From logits, by numpy in float64."""
    a, b = (np.asarray(m.logits(tokens), np.float64) for m in (model, other))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_what_does_not_help_is_not_kept(model, rounded, calibration):
    """Steps that are far too long: the start is kept, to the bit; and a loss that is no number ends the descent."""
    tuned, found = tune(model, rounded, calibration, Tuning(3, batch=8, rate=3.0, vector_rate=3.0, looks=3))
    assert found.kept == 0 and found.loss == found.first_loss and "none of 3 steps" in str(found)
    assert same(tuned.params, rounded.params)


def test_a_loss_that_is_no_number():
    trained = {"scales": {"w": jnp.zeros(3)}}

    def objective(trained, constants, batch, key):
        return jnp.sum((trained["scales"]["w"] - 1) ** 2) + jnp.where(batch == 2, jnp.nan, 0.0), {}

    where = iter(range(10))
    judge = lambda t: float(jnp.sum((t["scales"]["w"] - 1) ** 2))  # noqa: E731
    best, found = descend(
        objective, Tuning(6, 1, 0.1, looks=6), trained, {}, lambda _: jnp.float32(next(where)), 4, judge, "it"
    )
    assert found.broken == 3 and found.kept == 2 and found.loss == judge(best) < found.first_loss
    assert "no number at step 3" in str(found)
    with pytest.raises(UserError, match="it: its loss is nan before any tuning"):
        descend(objective, Tuning(), trained, {}, lambda _: jnp.float32(0), 4, lambda t: float("nan"), "it")


def test_bad_input(model, rounded, calibration):
    with pytest.raises(UserError, match="this one is packed"):
        tune(rounded, rounded, calibration)
    with pytest.raises(UserError, match="nothing to tune; quantize it first"):
        tune(model, model, calibration)
    with pytest.raises(UserError, match="window held out"):
        tune(model, rounded, dataclasses.replace(calibration, heldout=0))
    with pytest.raises(UserError, match="two architectures"):
        tune(model, dataclasses.replace(rounded, config=dataclasses.replace(CONFIG, norm_eps=1e-3)), calibration)
    with pytest.raises(UserError, match="rounds its inputs"):
        continuous.start({"w": weight("int8_row", RoundedInput(None))})
    with pytest.raises(UserError, match="steps must be at least 1, got 0"):
        Tuning(0)


BLOCKS = TuneBlocks(Tuning(steps=12, batch=8, rate=2e-2, looks=3))


@pytest.mark.slow
def test_blocks_are_tuned_as_the_walk_comes_by(model, calibration):
    plain, _ = quantize_model(model, PLAN, "gptq", calibration)
    tuned, report = quantize_model(model, PLAN, "gptq", calibration, tune=BLOCKS)
    notes = [t.calibration.note for t in report.tensors if t.name.endswith("attn/q/kernel")]
    ends = [tuple(map(float, re.findall(r"held out (\S+) -> (\S+)", note)[0])) for note in notes]
    assert len(ends) == 2 and all(after < 0.95 * before for before, after in ends), notes
    held = calibration.tokens[calibration.used :, :-1]
    assert kl(model, tuned, held) < kl(model, plain, held)
    a, b = (leaves_by_path(m.params) for m in (plain, tuned))
    first = "layers_0/attn/q/kernel"  # in front of it nothing was tuned: its codes are those of the recipe
    assert same(a[first].leaves["codes"], b[first].leaves["codes"]) and not same(a[first], b[first])


WITHIN = dataclasses.replace(BLOCKS, within=True)


def ends_of(report):
    """{what was tuned: (loss held out before, after)} of the first block."""
    note = next(t.calibration.note for t in report.tensors if t.name == "layers_0/attn/q/kernel")
    found = re.findall(
        r"(layers_0 tuned on its output(?: with \d weights still to be rounded)?),[^;]*held out (\S+) -> ([^\s;]+)",
        note,
    )
    return {what: (float(before), float(after)) for what, before, after in found}


def two_layers(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def test_what_is_still_float_makes_up_for_what_is_rounded():
    """Of the same steps, those that may move it come much further; it moves, and nothing else does but scales."""
    a, b, x = (jax.random.normal(jax.random.key(n), s) for n, s in enumerate([(64, 32), (32, 16), (40, 8, 64)]))
    floats = {"a": a / 8, "b": b / 6}
    packed, y = floats | {"a": qjax.quantize(floats["a"], "uint2_g64", axis=0)}, np.asarray(two_layers(floats, x))
    tuner = TuneBlocks(Tuning(steps=30, batch=8, rate=1e-2, weight_rate=2e-2, looks=3))
    ends = {}
    for rest in ((), ("b",)):
        new, said = tuner("it", two_layers, packed, np.asarray(x), y, 32, rest)
        ends[rest] = float(re.findall(r"-> (\S+)", said)[0])
        assert same(new["a"].leaves["codes"], packed["a"].leaves["codes"])
        assert bool((new["b"] == packed["b"]).all()) == (not rest) and ("1 weights still" in said) == bool(rest)
    assert ends["b",] < 0.9 * ends[()]


@pytest.mark.slow
def test_within_a_block_each_input_is_tuned_in_its_turn(model, calibration):
    """Behind q k v, o, and gate and up, and in the end."""
    tuned, report = quantize_model(model, PLAN, "gptq", calibration, tune=WITHIN)
    ends, whole = ends_of(report), "layers_0 tuned on its output"
    assert list(ends) == [*(f"{whole} with {n} weights still to be rounded" for n in (4, 3, 1)), whole]
    assert all(after < 0.97 * before for before, after in ends.values()), ends
    assert same(tuned.params["layers_0"]["attn_norm"], model.params["layers_0"]["attn_norm"])


@pytest.mark.slow
def test_within_a_block_what_does_not_help_moves_nothing(model, calibration):
    far = TuneBlocks(Tuning(2, batch=8, rate=3.0, weight_rate=3.0, looks=2), within=True)
    _, report = quantize_model(model, PLAN, "gptq", calibration, tune=far)
    assert all(before == after for before, after in ends_of(report).values())
    notes = [t.calibration.note for t in report.tensors if t.name.startswith("layers_") and t.calibration is not None]
    assert notes and all("none of 2 steps was better" in note for note in notes)


def test_within_a_block_only_one_makes_up_for_what_is_rounded(model, calibration):
    for recipe in ("gptaq", "best_gguf", "imatrix"):
        with pytest.raises(UserError, match="as a recipe's cross term does: take a recipe that has none"):
            quantize_model(model, PLAN, recipe, calibration, tune=WITHIN)
