"""A walk past experts: each is rounded to its own tokens, those with few to all; resumed, the bytes are the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_walk_resume import run, without_time
from tiny_walks import dense, get, plan_of, tiny_calibration, tiny_model

import qjax
from qjax.io.tokenizer_bpe import bpe_tokenizer
from qjax.lifting import report, watch
from qjax.models.mlp import routed
from qjax.models.model import Model
from qjax.models.stages import stages_of
from qjax.pipeline import quantize_model
from qjax.pipeline.few_tokens import NOTE, filled
from qjax.pipeline.passes import block_step, groups_of
from qjax.rounding import round_weight
from qjax.stats import Stats

CHANGES = {"layers": 1, "family": "mixtral", "experts": 4, "experts_used": 1, "expert_hidden": 64}
PLAN = plan_of(("embed/embedding", "keep"), ("head/kernel", "keep"), ("*", "Q4_0"))
GPT_OSS = {
    "family": "gpt_oss", "qkv_bias": True, "o_bias": True, "sinks": True, "expert_bias": True,
    "activation": "clamped_swiglu", "window": 9, "global_layers": (),
}  # fmt: skip
PARTS = ("gate", "up", "down")


def starved_model(**changes):
    """Expert 2 is between 0 and 1 in every score, so that it is never the first."""
    model = tiny_model(**CHANGES | changes)
    for layer in range(model.config.layers):
        router = model.params[f"layers_{layer}"]["mlp"]["router"]
        router["kernel"] = router["kernel"].at[:, 2].set((router["kernel"][:, 0] + router["kernel"][:, 1]) / 2)
    if model.config.expert_bias:  # which make something of a token that is not the expert's own
        for i, part in enumerate(("gate", "up")):
            leaf = model.params["layers_0"]["mlp"]["experts"][part]
            leaf["bias"] = jax.random.normal(jax.random.key(i), leaf["bias"].shape)
    return model


def moments(block, params, x, weights=None):
    """{part: (counts [experts], H [experts, n, n])} of the tokens that reach each expert, in numpy."""
    uses = {use.path: use.source for use in report(block, params, x)}
    seen = watch(block, lambda use, v: v if use.kind == "dot" else None)(params, x)[1]
    made = {}
    for part in PARTS:
        rows = np.asarray(seen[uses[f"mlp/experts/{part}/kernel"]], np.float64)
        rows = rows.reshape(rows.shape[0], -1, rows.shape[-1])
        counts = np.any(rows != 0, axis=2).sum(axis=1)
        made[part] = counts, np.einsum("eti,etj->eij", rows, rows) / np.maximum(counts, 1)[:, None, None]
    return made


@pytest.mark.parametrize("changes", [{}, pytest.param(GPT_OSS, marks=pytest.mark.slow)], ids=["mixtral", "gpt_oss"])
def test_each_expert_is_rounded_to_its_own_tokens_and_one_with_few_to_all(changes):
    model, calibration = starved_model(**changes), tiny_calibration(windows=20, heldout=4)
    recipe = qjax.recipe("nearest('h') >> ldlq() >> options(sequential=False)")
    out, table = quantize_model(model, PLAN, recipe, calibration)
    stages, params = stages_of(model.config), model.params["layers_0"]
    x = stages.embed({"embed": model.params["embed"]}, jnp.asarray(calibration.tokens[:16]))
    own, of_all = moments(stages.blocks[0], params, x), moments(stages.to_all[0], params, x)
    lines, fmt = {t.name: t.calibration for t in table.tensors}, qjax.format("Q4_0")
    for part in PARTS:
        (counts, H), (every, H_all) = own[part], of_all[part]
        n = H.shape[-1]
        assert counts[2] == 0 and set(every) == {16 * 24} and counts.max() >= n > counts.min()
        share = np.minimum(counts / n, 1)[:, None, None]
        path = f"layers_0/mlp/experts/{part}/kernel"
        w, got = get(model.params, path), np.asarray(dense(get(out.params, path)))
        for e, wanted in enumerate(jnp.asarray(share * H + (1 - share) * H_all, jnp.float32)):
            stats = Stats(wanted, jnp.diag(wanted))
            rounded = round_weight(w[e].T, fmt, recipe.roundings, stats, recipe.damping)
            same = np.isclose(got[e], np.asarray(fmt.decode(rounded.scales, rounded.codes)).T, rtol=1e-5, atol=1e-7)
            assert same.mean() > 0.98, (part, e)
        line = lines[path]
        assert line.by_matrix == tuple(counts) and line.tokens == 0
        few = ", ".join(f"{e} ({c})" for e, c in enumerate(counts) if c < n)
        count = sum(c < n for c in counts)
        assert line.note == f"{count} of 4 matrices saw fewer tokens than their {n} inputs, {few}; {NOTE}"
        assert np.isfinite([line.loss, line.heldout_loss]).all()
    assert lines["layers_0/attn/q/kernel"].by_matrix == ()
    kept = {t.name: t.kept for t in table.tensors if t.kept}
    assert kept["layers_0/mlp/router/kernel"] == "a router"


@pytest.mark.slow
def test_an_expert_without_tokens_is_shrunk_as_if_it_had_the_wanted_ones():
    """Where a recipe shrinks, used and held-out statistics are pooled by their counts: those of what they stand on."""
    model, calibration = starved_model(), tiny_calibration(windows=20, heldout=5)
    recipe = qjax.recipe("nearest('h') >> ldlq('act', cross=1.0) >> options(shrink=True)")
    out, table = quantize_model(model, PLAN, recipe, calibration)
    lines = {t.name: t for t in table.tensors}
    for part in PARTS:
        line = lines[f"layers_0/mlp/experts/{part}/kernel"]
        assert line.calibration.by_matrix[2] == line.calibration.tokens == 0 and NOTE in line.calibration.note
        assert sum(line.calibration.by_matrix) == calibration.tokens.size
        w, got = get(model.params, line.name), np.asarray(dense(get(out.params, line.name)))
        lost = [np.square(got[e] - w[e]).sum() / np.square(w[e]).sum() for e in range(4)]
        assert lost[2] < 1.5 * np.median(lost)


def test_filling_up_goes_over_into_an_experts_own_statistics():
    H = jnp.stack([jnp.eye(2) * s for s in (1.0, 2.0, 4.0)])
    own = Stats(H=H, absmax=jnp.ones((3, 2)), count=jnp.array([0.0, 5.0, 10.0]))
    of_all = Stats(H=8 * H, absmax=jnp.full((3, 2), 3.0), count=jnp.full(3, 99.0))
    made = filled(own, of_all, 10.0)
    np.testing.assert_allclose(made.H[:, 0, 0], [8, 9, 4])
    np.testing.assert_allclose(made.absmax[:, 0], [3, 3, 1])
    np.testing.assert_array_equal(made.count, [10, 10, 10])


def test_an_experts_gradient_counts_for_its_token():
    """What goes back into W_down of expert e is its share of g: a token's size is over all experts it goes to."""
    model = tiny_model(**CHANGES | {"experts_used": 2})
    block, params = stages_of(model.config).blocks[0], model.params["layers_0"]
    x, g = jax.random.normal(jax.random.key(0), (2, 2, 6, 64))
    groups = groups_of(block, params, x)
    assert [len(group) for group in groups] == [3, 1, 1, 2, 1]
    _, sizes, *_ = block_step(block, tuple(tuple(use.key for use in group) for group in groups), (), (), params, x, g)
    uses = {use.path: use.source for use in report(block, params, x)}
    read = watch(block, lambda use, v: v if use.kind == "dot" else None)(params, x)[1][uses["mlp/router/kernel"]]
    _, share = routed(model.config, read @ params["mlp"]["router"]["kernel"])
    expected = jnp.sum(share**2, axis=-1) * jnp.sum(g**2, axis=-1)
    np.testing.assert_allclose(sizes[-1], expected, rtol=1e-4)


@pytest.mark.slow
def test_a_walk_that_is_stopped_among_experts_goes_on(tmp_path):
    config_changes = {"layers": 2, "experts_used": 2}
    model = tiny_model(**CHANGES | config_changes)
    tokens = ["<s>", "</s>", *(chr(ord("!") + i) for i in range(model.config.vocab - 2))]
    tokenizer = bpe_tokenizer(tokens, [3, 3] + [1] * (len(tokens) - 2), [], "gpt-2", bos=0, eos=1, add_bos=True)
    qjax.save(Model(model.config, model.params, tokenizer), tmp_path / "hf")
    recipe = "nearest('h') >> ldlq('act', cross=1.0) >> options(sensitive=True)"
    whole = run(tmp_path / "hf", tmp_path / "whole.gguf", plan=PLAN, recipe=recipe)
    for k, behind in enumerate(("layers_0/mlp/experts/down/kernel", "layers_1/mlp/experts/gate/kernel")):
        out = tmp_path / f"{k}.gguf"

        def walked(step, behind=behind):
            if step.path == behind:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "hf", out, plan=PLAN, recipe=recipe, walked=walked)
        again = run(tmp_path / "hf", out, plan=PLAN, recipe=recipe)
        assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
        assert without_time(again) == without_time(whole)
    in_memory, _ = quantize_model(model, PLAN, qjax.recipe(recipe), tiny_calibration())
    loaded = qjax.load(tmp_path / "whole.gguf").params
    jax.tree.map(np.testing.assert_array_equal, loaded["layers_1"]["mlp"], in_memory.params["layers_1"]["mlp"])
    assert dataclasses.replace(qjax.load(tmp_path / "whole.gguf").config, norm_eps=1e-5) == model.config
