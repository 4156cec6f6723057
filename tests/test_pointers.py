"""What one tries first and gets wrong: one line that says what to call instead."""

import jax.numpy as jnp
import pytest

import qjax
from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.model import Model
from qjax.pipeline import calibration_of, quantize_model, quantize_params
from qjax.plan.named import plan_named

pytestmark = pytest.mark.usefixtures("without_type_checks")

W, X = jnp.ones((64, 24)), jnp.ones((2, 64))
Q = qjax.quantize(W, "Q4_0", axis=0)
SQUARE = qjax.quantize(jnp.ones((64, 32)), "Q4_0")
CONFIG = DecoderConfig(vocab=96, dim=64, hidden=128, layers=8, heads=4, kv_heads=2, head_dim=16)
MODEL = Model(CONFIG, {"a": W})
H = qjax.Stats(H=jnp.eye(64), count=jnp.float32(3))


class Linear:
    """Stands for a module that is no array."""


MISTAKES = {
    "dot the other way round": (lambda: qjax.dot(Q, X), "the input comes first: dot(x, q)"),
    "dot of two arrays": (lambda: qjax.dot(X, W), "quantize(w, format) makes one"),
    "dot along the other axis": (lambda: qjax.dot(X, SQUARE), "its blocks run along axis -1"),
    "matmul": (lambda: X @ Q, "run the model through qjax.lift"),
    "jnp.dot": (lambda: jnp.dot(X, Q), "contract with qjax.dot(x, q)"),
    "a module with packed weights": (lambda: Q[...], "run the model through qjax.lift"),
    "quantize a module": (lambda: qjax.quantize(Linear(), "Q4_0"), "got Linear: quantize_params takes a whole tree"),
    "quantize a tree": (lambda: qjax.quantize({"a": W}, "Q4_0"), "got dict: quantize_params takes a whole tree"),
    "quantize a Model": (lambda: qjax.quantize(MODEL, "Q4_0"), "quantize_model a qjax Model"),
    "quantize twice": (lambda: qjax.quantize(Q, "Q4_0"), "is quantized already"),
    "axis of rows": (lambda: qjax.quantize(W, "Q4_0"), "axis=0, as for a flax kernel (in, out)"),
    "axis of kernels": (lambda: qjax.quantize(W.T, "Q4_0", axis=-2), "axis=-1, as for rows (out, in)"),
    "axis by name": (lambda: qjax.quantize(W, "Q4_0", axis="in"), "axis must be a number"),
    "axes counted from the front": (lambda: quantize_params({"a": W}, "Q4_0", axes={"a": 0}), "say -1 for rows"),
    "a Model is no function": (lambda: MODEL(X), "model.logits(tokens)"),
    "a Model is no tree": (lambda: quantize_params(MODEL, "Q4_0"), "give model.params"),
    "a tree is no Model": (lambda: quantize_model(MODEL.params, "Q4_0", "gptq", None), "go to quantize_params"),
    "a text is no calibration": (lambda: quantize_model(MODEL, "Q4_0", "gptq", "text"), "calibration_text"),
    "no plan": (lambda: quantize_params({"a": W}, None), "a plan is a Plan, a Format, a format's name"),
    "a mix without a model": (lambda: quantize_params({"a": W}, "Q4_K_M"), "give a format (Q4_K)"),
    "a mix misspelt": (lambda: plan_named("Q4_KM", CONFIG), "unknown type 'Q4_KM'; did you mean Q4_K_M or"),
    "a mix of llama.cpp's": (lambda: plan_named("Q8_K", CONFIG), "Q8_K is a type of llama.cpp's that qjax does not"),
    "a type of llama.cpp's": (lambda: qjax.quantize(W, "q8_k"), "Q8_K is a type of llama.cpp's that qjax does"),
    "no cross": (
        lambda: quantize_params({"a": W}, "Q4_0", {"a": H}, recipe="gptaq"),
        "qjax.observe(apply_fn, qparams, batches, kinds=('cross', ...), float_params=params) collects it",
    ),
    "no absmean": (
        lambda: quantize_params({"a": W}, "Q4_0", {"a": H}, recipe="awq"),
        "qjax.observe(apply_fn, params, batches, kinds=('absmean', ...)) collects it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_points_the_way(name):
    call, message = MISTAKES[name]
    with pytest.raises(UserError) as e:
        call()
    assert message in str(e.value) and "\n" not in str(e.value)


def test_a_packed_tree_still_passes_through_jax():
    """Standing for no array must not get in the way of what trees are for."""
    import jax

    again = jax.jit(lambda q: q)(Q)
    assert again.shape == Q.shape and (qjax.dequantize(again) == qjax.dequantize(Q)).all()
    stacked = jax.vmap(lambda w: qjax.quantize(w, "Q4_0", axis=0))(jnp.stack([W, W]))
    assert jax.tree.map(jnp.zeros_like, stacked).shape == (2, 64, 24)
    assert jax.lax.scan(lambda x, q: (x, qjax.dot(X, q)), 0, stacked)[1].shape == (2, 2, 24)


# --- names as plans -------------------------------------------------------------------------------


def test_names_are_plans(monkeypatch):
    """In all three functions; a mix chooses as llama-quantize does, which asks whether importance is known."""
    import qjax.pipeline.calibrated as calibrated

    packed, _ = quantize_params({"a": {"kernel": W}}, "Q4_0")
    assert packed["a"]["kernel"].format.name == "Q4_0" and packed["a"]["kernel"].axis == -2

    class Stop(Exception):
        pass

    def walk(stages, load, formats, *args, **kwargs):
        raise Stop({path: fmt.name for path, (fmt, _) in formats.items()})

    monkeypatch.setattr(calibrated, "walk", walk)
    text = calibration_of(64, [3] * 64, context=8)
    for recipe, expected in (("imatrix", "Q4_1"), ("rtn", "Q4_0")):
        with pytest.raises(Stop) as chosen:
            quantize_model(MODEL, "Q4_0", recipe, text)
        assert chosen.value.args[0]["layers_0/mlp/down/kernel"] == expected
        assert chosen.value.args[0]["layers_1/mlp/down/kernel"] == "Q4_0"
    with pytest.raises(Stop) as chosen:
        quantize_model(MODEL, "pure:NF4", "rtn", text)
    assert set(chosen.value.args[0].values()) == {"NF4"}


def test_plans_by_name_know_of_the_imatrix():
    def down(name, known):
        return next(r for r in plan_named(name, CONFIG, known).rules if r.pattern == "layers_0/mlp/down/kernel").format

    assert (down("Q5_0", False), down("Q5_0", True)) == ("Q5_0", "Q5_1")
    wide = DecoderConfig(vocab=96, dim=256, hidden=256, layers=8, heads=4, kv_heads=2, head_dim=64)
    plans = [plan_named("IQ4_XS", wide, known) for known in (False, True)]
    assert plans[0] != plans[1]


def test_a_mix_says_what_does_not_fit():
    """SmolLM2's rows of 576 are no multiple of 256, so its Q3_K_M is mostly Q4_0."""
    smol = DecoderConfig(vocab=49152, dim=576, hidden=1536, layers=30, heads=9, kv_heads=3, head_dim=64, tied=True)
    note = plan_named("Q3_K_M", smol).note
    assert note.startswith("Q3_K_M: 181 of 211 tensors have rows of 576 weights")
    assert "Q4_0 for Q3_K in 120" in note and plan_named("Q8_0", smol).note == ""
    assert plan_named("Q3_K_M", smol) == qjax.Plan(plan_named("Q3_K_M", smol).rules, "Q3_K_M")  # a note is no rule
