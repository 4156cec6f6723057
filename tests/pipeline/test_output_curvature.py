"""G at the outputs of a decoder's weights: against gradients of the whole model, in memory, in files, and damaged."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_walks import CONFIG, tiny_calibration, tiny_model

import qjax
from qjax.errors import UserError
from qjax.models.decoder import Decoder
from qjax.models.stages import stages_of
from qjax.pipeline import inputs
from qjax.pipeline.activations import Activations
from qjax.pipeline.calibrated import quantize_model
from qjax.pipeline.output_curvature import OutputCurvature, rows_of_block, summed_curvature
from qjax.pipeline.survey import survey
from qjax.pipeline.walk_state import save_survey, saved_survey


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def made(model):
    return survey(stages_of(CONFIG), model, tiny_calibration())


def test_it_is_the_mean_over_tokens_in_blocks():
    g = np.random.default_rng(0).normal(size=(2, 7, 12)).astype(np.float32)
    g[0, 3] = 0  # a token that the loss does not mind
    found = np.asarray(summed_curvature(jnp.asarray(g), 4))
    for e in range(2):
        for k in range(3):
            part = [np.outer(t[4 * k : 4 * k + 4], t[4 * k : 4 * k + 4]) / np.linalg.norm(t) for t in g[e] if t.any()]
            np.testing.assert_allclose(found[e, k], np.sum(part, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "out", "m"),
    [("attn/q/kernel", 64, 16), ("attn/o/kernel", 64, 64), ("mlp/up/kernel", 1536, 512), ("mlp/up/kernel", 1153, 1),
     ("attn/kv_b/kernel", 1024, 512)],
)  # fmt: skip
def test_rows_of_a_head_stand_together(path, out, m):
    assert rows_of_block(path, out, 16) == m


@pytest.mark.parametrize("path", ["attn/k/kernel", "mlp/up/kernel"])
def test_it_is_that_of_the_whole_model(model, made, path):
    """Gradients where flax adds something to the output of one weight; labels drawn as the survey draws them."""
    calibration, where = tiny_calibration(), ("layers_1", *path.split("/")[:-1])
    split = calibration.to_shrink().used

    @jax.jit
    def gradient(tokens, window):
        def loss(shift):
            def shifted(call, args, kwargs, context):
                y = call(*args, **kwargs)
                return y + shift if isinstance(context.module, nn.Dense) and context.module.path == where else y

            with nn.intercept_methods(shifted):
                z = Decoder(CONFIG).apply({"params": model.params}, tokens[None])[0]
            key = jax.random.fold_in(jax.random.key(calibration.seed), window)
            label = jnp.argmax(jax.lax.stop_gradient(z) + jax.random.gumbel(key, z.shape), axis=-1)
            return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(z), label[:, None], axis=-1))

        return jax.grad(loss)(jnp.zeros((1, len(tokens), 64)))[0]

    g = np.stack([gradient(jnp.asarray(t), i) for i, t in enumerate(calibration.tokens)]).astype(np.float64)
    for ours, part in zip(made.outputs.of(1)[path], (g[:split], g[split:]), strict=True):
        v = part.reshape(-1, 64) / np.sqrt(np.linalg.norm(part.reshape(-1, 64), axis=1, keepdims=True))
        whole = v.T @ v / len(v)
        k, m, _ = ours.shape
        for i in range(k):
            at = slice(i * m, (i + 1) * m)
            np.testing.assert_allclose(ours[i], whole[at, at], atol=2e-4 * np.abs(whole).max())


def test_a_walk_uses_it_and_loses_less(model):
    """In the metric of G, over all weights; and the ledger says where."""
    plan, calibration = qjax.Plan((qjax.Rule("layers_*", "int3_g32"), qjax.Rule("*", "keep"))), tiny_calibration(32)
    found = {}
    for turns in (0, 8):
        recipe = f"nearest('h') >> ldlq('act') >> options(sensitive=0.5, shrink=True, two_sided={turns})"
        q, report = quantize_model(model, plan, recipe, calibration)
        lines = [t.calibration for t in report.tensors if t.calibration]
        assert any(line.output_shrinkage is not None for line in lines) == bool(turns)
        found[turns] = divergence(model, q)
    assert found[8] < 0.9 * found[0]


def divergence(model, q):
    """Mean KL on other tokens."""
    tokens = jnp.asarray(tiny_calibration(32, seed=9).tokens)
    p, r = (jax.nn.log_softmax(m.logits(tokens)) for m in (model, q))
    return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - r), axis=-1)))


def test_files_say_what_memory_says_and_damage_is_named(model, made, tmp_path):
    calibration = tiny_calibration()
    there = survey(stages_of(CONFIG), model, calibration, tmp_path)
    for i in range(CONFIG.layers):
        for path, G in made.outputs.of(i).items():
            np.testing.assert_array_equal(there.outputs.of(i)[path], G)
    save_survey(tmp_path, there)
    shape = (*calibration.tokens.shape, CONFIG.dim)
    said = []
    assert saved_survey(tmp_path, CONFIG.layers, shape, said.append, True) is not None and not said
    file = tmp_path / "output_curvature_1.npz"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    assert saved_survey(tmp_path, CONFIG.layers, shape, said.append, True) is None
    assert len(said) == 1 and "output_curvature_1.npz" in said[0]
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        there.outputs.of(1)
    assert saved_survey(tmp_path, CONFIG.layers, shape, said.append) is not None, "a recipe that does not ask for it"
    assert OutputCurvature().of(3) == {}


def test_vectors_are_taken_in_one_pass_and_matrices_one_behind_the_other(model, monkeypatch):
    """A block of an imatrix is run once to be looked at; behind weights that are put in place, once an input."""
    looks, means = [], inputs._means
    monkeypatch.setattr(inputs, "_means", lambda *args: looks.append(len(args[3])) or means(*args))
    plan = qjax.Plan((qjax.Rule("layers_*", "Q4_0"), qjax.Rule("*", "keep")))
    for recipe, expected in (("imatrix", [4] * CONFIG.layers), ("gptq", [1] * 4 * CONFIG.layers)):
        looks.clear()
        quantize_model(model, plan, recipe, tiny_calibration())
        assert looks == expected


def test_what_a_block_read_is_let_go_before_the_next(tmp_path, model, monkeypatch):
    """Mapped pages that somebody holds stay resident: a survey would take memory for all blocks."""
    held, alive = [], []

    def drop(self):
        gc.collect()
        alive.append(sum(ref() is not None for ref in held))
        held.append(weakref.ref(self.array))

    monkeypatch.setattr(Activations, "drop", drop)
    survey(stages_of(CONFIG), model, tiny_calibration(), tmp_path)
    assert len(alive) == CONFIG.layers + 1 and not any(alive)
