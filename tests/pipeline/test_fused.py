"""Fused scales: the model is unchanged, rounding it loses less, and planted outliers are what they are made for."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.evaluate.judge import baseline_of, judge
from qjax.models import stdlib_text
from qjax.models.fuse import fuse_scale, rotated
from qjax.models.graph import edges
from qjax.pipeline import quantize_model
from qjax.pipeline.fused import fused_scales
from qjax.pipeline.windows import calibration_text
from qjax.plan import Plan
from qjax.reparam import awq_scale, hadamard, rescale, smooth


@functools.cache
def setting():
    """The reference model, a small calibration text, and a judged one."""
    model = qjax.load("reference")
    calibration = calibration_text(model, stdlib_text.calibration_text(60_000, 0), limit=9, context=128)
    return model, calibration, stdlib_text.heldout_text()[:60_000]


def logits(model):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab, (2, 32)), jnp.int32)
    return model.logits(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("search", [smooth(0.5), awq_scale(5), rescale()], ids=lambda s: s.name)
def test_the_model_is_unchanged(search):
    model, calibration, _ = setting()
    fused = fused_scales(model, search, "uint4_g128", calibration)
    a, b = logits(model), logits(fused)
    assert float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))) < 1e-5
    moved = fused.params["layers_0"]["attn"]["q"]["kernel"] / model.params["layers_0"]["attn"]["q"]["kernel"]
    assert float(jnp.std(jnp.log(jnp.median(jnp.abs(moved), axis=1)))) > 0.02  # and not untouched


def planted(model, factor=40.0, channels=(3, 70)):
    """The same function with a few activation channels behind each norm made `factor` times as large."""
    params = model.params
    for edge in edges(model.config):
        if edge.is_norm:
            d = np.ones(edge.channels, np.float32)
            d[list(channels)] = 1 / factor
            params = fuse_scale(params, model.config, edge, d)
    return dataclasses.replace(model, params=params)


@functools.cache
def outlier_kl():
    """Mean KL of every 8-bit method on the model with planted outliers."""
    model, calibration, text = setting()
    model = planted(model)
    baseline = baseline_of(model, text, context=128, limit=6)

    def kl(recipe, model=model):
        recipe = qjax.recipe(recipe)
        plan = Plan.from_dict({"rules": {"layers_*": recipe.format.name, "*": "keep"}})
        made, _ = quantize_model(model, plan, recipe, calibration)
        return judge(made, baseline=baseline).divergence.kl_mean

    found = {name: kl(f"{name}:int8_row") for name in ("rtn", "w8a8", "smoothquant")}
    found["llm_int8"] = kl("act(threshold=20.0) >> int8_row >> nearest()")
    found["columns"] = kl("columns(threshold=20.0) >> act() >> int8_row >> nearest()")
    found["fused"] = kl("w8a8:int8_row", fused_scales(model, smooth(0.5), "int8_row", calibration))
    return found


@pytest.mark.slow
def test_planted_outliers():
    """Plain W8A8 breaks; mixed products, smoothing (at run time and fused) and outlier columns mend it."""
    kl = outlier_kl()
    assert kl["w8a8"] > 5 * kl["rtn"]
    for name in ("smoothquant", "llm_int8", "columns", "fused"):
        assert kl[name] < 0.5 * kl["w8a8"], (name, kl)


@pytest.mark.slow
def test_a_rotated_model_rounds_with_feedback():
    """Fused rotation, then a recipe onto GGUF types: packs as any other model does."""
    model, calibration, text = setting()
    turned = rotated(model, 0, untie=True)
    baseline = baseline_of(model, text, context=128, limit=6)
    plan = Plan.from_dict({"rules": {"layers_*": "Q3_K", "*": "keep"}})
    kl = {}
    for name, source in (("plain", model), ("rotated", turned)):
        for recipe in ("rtn", "gptq"):
            made, _ = quantize_model(source, plan, recipe, calibration)
            kl[name, recipe] = judge(made, baseline=baseline).divergence.kl_mean
    assert kl["rotated", "gptq"] < 0.7 * kl["rotated", "rtn"]


def test_errors():
    model, calibration, _ = setting()
    with pytest.raises(UserError, match="no channel scaling"):
        fused_scales(model, hadamard(), "Q4_K", calibration)
    with pytest.raises(UserError, match="no edge of this decoder begins at 'v'"):
        fused_scales(model, smooth(), "Q4_K", calibration, only=("v",))  # grouped queries
    packed, _ = qjax.quantize_params(model.params, Plan.from_dict({"rules": {"layers_0/*": "Q4_0", "*": "keep"}}))
    with pytest.raises(UserError, match="is packed"):
        fused_scales(dataclasses.replace(model, params=packed), smooth(), "Q4_K", calibration)
