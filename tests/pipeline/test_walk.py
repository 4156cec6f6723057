"""Block by block: every weight is rounded to what its input has become, and the report says what that cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny_walks import (
    GROUPS,
    dense,
    get,
    inputs_of,
    plan_of,
    put,
    second_moment,
    tiny_calibration,
    tiny_model,
)

import qjax
from qjax.models.decoder import Decoder
from qjax.pipeline import quantize_model
from qjax.pipeline.calibrated import survey_model
from qjax.recipes import RECIPES
from qjax.rounding import round_weight
from qjax.stats import Stats

KERNELS = plan_of(("embed/embedding", "keep"), ("*", "Q4_0"))


def by_hand(model, recipe, calibration, sequential):
    """{path: (Rounded, dense weight)} of the kernels, statistics taken from flax's whole decoder each time."""
    fmt, made = qjax.format("Q4_0"), {}
    now, used = model.params, calibration.used
    was = inputs_of(model.config, model.params, calibration.tokens)
    groups = [[f"layers_{i}/{name}/kernel" for name in group] for i in range(model.config.layers) for group in GROUPS]
    for group in [*groups, ["head/kernel"]]:
        x = inputs_of(model.config, now if sequential else model.params, calibration.tokens)[group[0]]
        H, held = second_moment(x[:used]), second_moment(x[used:])
        cross = second_moment(was[group[0]][:used] - x[:used], x[:used])
        stats = Stats(H, jnp.diag(H), cross=cross, count=jnp.float32(calibration.tokens[:used].size))
        stats = stats.only(tuple(recipe.requires))
        for path in group:
            w = get(model.params, path).T
            rounded = round_weight(w, fmt, recipe.roundings, stats, recipe.damping, held)
            made[path] = rounded, fmt.decode(rounded.scales, rounded.codes).T
            now = put(now, path, made[path][1])
    return made


@pytest.mark.slow
@pytest.mark.parametrize("line, sequential", [
    ("nearest('h') >> ldlq('act', cross=1.0) >> descend(1)", True),
    ("nearest('h') >> ldlq('act', cross=1.0) >> descend(1) >> options(sequential=False)", False),
    ("imatrix", False),
])  # fmt: skip
def test_statistics_are_those_behind_what_is_rounded_already(line, sequential):
    """A walk equals the naive loop: all of the decoder run anew, in flax, before each group of weights."""
    model, calibration = tiny_model(), tiny_calibration()
    recipe = qjax.recipe(line)
    out, report = quantize_model(model, KERNELS, recipe, calibration)
    expected, lines = by_hand(model, recipe, calibration, sequential), {t.name: t for t in report.tensors}
    assert len(expected) == 15
    for path, (rounded, w) in expected.items():
        same = np.isclose(np.asarray(dense(get(out.params, path))), np.asarray(w), rtol=1e-5, atol=1e-7).mean()
        line = lines[path].calibration
        for got, want in ((line.loss, rounded.loss), (line.first_loss, rounded.first_loss),
                          (line.heldout_loss, rounded.heldout_loss)):  # fmt: skip
            if "H" in recipe.requires:
                assert got == pytest.approx(float(want), rel=5e-3)
        assert same > 0.98, path


# --- curvature --------------------------------------------------------------------------------------------------------


def gradients_of(model, calibration):
    """Of the loss at labels drawn from the model, token by token: at the embedding's output and at every kernel's."""
    config, tokens = model.config, jnp.asarray(calibration.tokens)

    def logits_of(deltas):
        def shifted(call, args, kwargs, context):
            y = call(*args, **kwargs)
            if not isinstance(context.module, nn.Dense | nn.Embed) or context.method_name != "__call__":
                return y
            name = "/".join(context.module.path)
            shapes[name] = y.shape
            return y + deltas[name] if name in deltas else y

        with nn.intercept_methods(shifted):
            return Decoder(config).apply({"params": model.params}, tokens)

    shapes = {}
    logits = logits_of({})
    keys = [jax.random.fold_in(jax.random.key(calibration.seed), w) for w in range(len(tokens))]
    labels = jnp.stack([jax.random.categorical(k, z) for k, z in zip(keys, logits, strict=True)])

    def loss(deltas):
        log_p = jax.nn.log_softmax(logits_of(deltas))
        return -jnp.sum(jnp.take_along_axis(log_p, labels[..., None], -1))

    g = jax.jit(jax.grad(loss))({name: jnp.zeros(shape) for name, shape in shapes.items()})
    mass = 1 - jnp.sum(jax.nn.softmax(logits) ** 2, -1)
    return {k: np.asarray(v) for k, v in g.items()}, np.asarray(mass)


def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(np.asarray(b)).max())


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, pytest.param({"tied": True, "embed_scale": True, "logit_softcap": 5.0, "window": 7}, marks=pytest.mark.slow)
])  # fmt: skip
def test_the_survey_equals_an_explicit_gradient(options):
    model, calibration = tiny_model(**options), tiny_calibration(seed=3)
    used = calibration.used
    seen = survey_model(model, calibration)
    g, mass = gradients_of(model, calibration)
    close(seen.embedding, second_moment(g["embed"][:used]))
    assert seen.tokens == calibration.tokens[:used].size
    n = final_input(model.config, model.params, calibration.tokens)[:used]
    close(seen.head, second_moment(n * mass[:used, :, None], n))
    close(seen.head_sensitivity, mass / mass[:used].mean())
    for layer, sensitivity in enumerate(seen.sensitivity):
        assert sensitivity.shape == (4, *calibration.tokens.shape)
        for group, got in zip(GROUPS, sensitivity, strict=True):
            size = sum((g[f"layers_{layer}/{name}"] ** 2).sum(-1) for name in group)
            close(got, size / size[:used].mean())


def final_input(config, params, tokens):
    """What the head reads, tied or not."""
    seen = []

    def record(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.module.name == "final_norm":
            seen.append(y)
        return y

    with nn.intercept_methods(record):
        Decoder(config).apply({"params": params}, tokens)
    return np.asarray(seen[0])


@pytest.mark.slow
def test_no_label_depends_on_the_batch():
    model = tiny_model()
    a, b = (survey_model(model, tiny_calibration(batch=n)) for n in (2, 4))
    close(a.embedding, b.embedding)
    close(a.sensitivity[1], b.sensitivity[1])


# --- one model, all of it rounded, sensitive --------------------------------------------------------------------------

SENSITIVE = "nearest('h') >> ldlq('act') >> descend(1) >> options(sensitive=True)"


def relative_loss(w, w_hat, H):
    """tr(E H E^T) / tr(W H W^T), rows of w as `H` sees them."""
    w, e, H = (np.asarray(a, np.float64) for a in (w, w - w_hat, H))
    return np.trace(e @ H @ e.T) / np.trace(w @ H @ w.T)


@pytest.fixture(scope="module")
def walked():
    """(model, calibration, its rounded form, report lines by name, steps)."""
    model, calibration, steps = tiny_model(), tiny_calibration(), []
    plan = plan_of(("layers_0/mlp/up/kernel", "keep"), ("*", "Q4_0"))
    out, report = quantize_model(model, plan, SENSITIVE, calibration, progress=steps.append)
    return model, calibration, out, report, steps


@pytest.mark.slow
def test_losses_are_those_of_the_written_weights_in_their_curvature(walked):
    """Of the embedding in C, of the others in their token-weighted H behind everything else that was rounded."""
    model, calibration, out, report, _ = walked
    used, lines = calibration.used, {t.name: t.calibration for t in report.tensors}
    g, mass = gradients_of(model, calibration)
    embed = "embed/embedding"
    loss = relative_loss(get(model.params, embed), dense(get(out.params, embed)), second_moment(g["embed"][:used]))
    assert lines[embed].loss == pytest.approx(loss, rel=1e-3)
    size = {"head/kernel": mass}
    size |= {f"layers_{i}/mlp/down/kernel": (g[f"layers_{i}/mlp/down"] ** 2).sum(-1) for i in range(2)}
    x = inputs_of(model.config, out.dense, calibration.tokens)
    for path, v in size.items():
        v = np.asarray(v / v[:used].mean())[..., None]
        w, w_hat = get(model.params, path).T, dense(get(out.params, path)).T
        for half, got in ((slice(used), lines[path].loss), (slice(used, None), lines[path].heldout_loss)):
            expected = relative_loss(w, w_hat, second_moment(v[half] * np.asarray(x[path])[half], x[path][half]))
            assert got == pytest.approx(expected, rel=2e-3), (path, half)


def test_the_report_of_every_weight(walked):
    model, calibration, out, report, _ = walked
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(model.params)]
    assert sorted(t.name for t in report.tensors) == sorted(names)
    for t in report.tensors:
        leaf, line = get(out.params, t.name), t.calibration
        assert qjax.is_qtensor(leaf) == (t.kept is None) == (line is not None), t.name
        assert t.nbytes == leaf.nbytes
        if line is None:
            assert leaf is get(model.params, t.name)
            continue
        assert 0 < line.loss < line.first_loss < 0.1
        assert line.damping >= 0.05 and line.tokens == calibration.tokens[: calibration.used].size
        assert line.seconds > 0 and line.note == ""
        w = np.asarray(get(model.params, t.name))
        assert t.error == pytest.approx(np.linalg.norm(dense(leaf) - w) / np.linalg.norm(w), rel=1e-4)
        if t.name == "embed/embedding":
            assert line.heldout_loss is line.first_heldout_loss is None
        else:
            assert 0 < line.heldout_loss < 0.1 and 0 < line.first_heldout_loss < 0.1


def test_progress_tells_each_weight_once_in_order(walked):
    _, _, _, report, steps = walked
    order = ["embed/embedding"]
    order += [f"layers_{i}/{name}/kernel" for i in range(2) for group in GROUPS for name in group] + ["head/kernel"]
    order.remove("layers_0/mlp/up/kernel")
    assert [s.path for s in steps] == order
    assert [(s.done, s.total) for s in steps] == [(i + 1, len(order)) for i in range(len(order))]
    lines = {t.name: t.calibration for t in report.tensors}
    assert all(s.report == lines[s.path] for s in steps)


@pytest.mark.slow
def test_a_tied_embedding_pays_for_both_its_uses():
    model, calibration = tiny_model(tied=True), tiny_calibration()
    out, report = quantize_model(model, plan_of(("embed/*", "Q4_0"), ("*", "keep")), SENSITIVE, calibration)
    g, mass = gradients_of(model, calibration)
    n = final_input(model.config, model.params, calibration.tokens)[: calibration.used]
    H = second_moment(g["embed"][: calibration.used]) + second_moment(n * mass[: calibration.used, :, None], n)
    (line,) = [t.calibration for t in report.tensors if t.calibration]
    w, w_hat = model.params["embed"]["embedding"], out.dense["embed"]["embedding"]
    assert line.loss == pytest.approx(relative_loss(w, w_hat, H), rel=1e-3)
    assert line.loss < 0.9 * line.first_loss


def test_a_weight_that_saw_few_tokens_says_so():
    plan = plan_of(("head/kernel", "Q4_0"), ("*", "keep"))
    _, report = quantize_model(tiny_model(), plan, "imatrix", tiny_calibration(windows=4))
    (line,) = [t.calibration for t in report.tensors if t.calibration]
    assert line.tokens == 48 and line.note == "saw 48 tokens, fewer than its 64 inputs"


# --- recipes ----------------------------------------------------------------------------------------------------------

SLOW = ("gptq", "gptaq", "best_gguf", "spqr")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in RECIPES])
def test_every_recipe_walks(name):
    model, calibration = tiny_model(), tiny_calibration()
    seen = survey_model(model, calibration) if name == "best_gguf" else None
    # 8 bits where the inputs are rounded too, an offset or books where those are what is fitted
    format = {"hqq": "uint4_g32_zf16", "aqlm": "aqlm_2x8_g8"}.get(
        name, "int8_row" if name in ("smoothquant", "llm_int8", "w8a8") else "int4_g32"
    )
    out, report = quantize_model(model, plan_of(("*", format)), name, calibration, seen=seen)
    assert report.formats[format] == sum(w.size for w in jax.tree.leaves(model.params) if w.ndim == 2)
    now, was = (np.asarray(m.logits(calibration.tokens)) for m in (out, model))
    print(name, ((now - was) ** 2).mean() / (was**2).mean())
    assert ((now - was) ** 2).mean() < 0.05 * (was**2).mean()


@pytest.mark.slow
def test_the_report_says_that_an_embedding_is_not_rotated():
    """A looked-up weight has no input to change: its recipe's reparametrization is left out, and a note says so."""
    model, plan = tiny_model(), plan_of(("*", "Q8_0"))
    recipe = "hadamard('in') >> Q8_0 >> nearest()"
    notes = {
        path: t.calibration.note
        for report in (
            qjax.quantize_model(model, plan, recipe, tiny_calibration())[1],
            qjax.quantize_params(model.params, plan, recipe=recipe)[1],
        )
        for t in report.tensors
        if t.calibration is not None
        for path in [t.name]
    }
    assert "without the recipe's changes of variables" in notes.pop("embed/embedding")
    assert notes and not any("changes of variables" in note for note in notes.values())
