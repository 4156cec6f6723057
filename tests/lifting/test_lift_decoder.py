"""The built-in decoder, unchanged, on packed weights: equal to dequantize-then-apply, at the same cost."""

import time

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest
from lift_programs import CONFIG, TOKENS, assert_close, decoder, dense_params, pack_decoder

import qjax
from qjax.lifting import lift, report
from qjax.models.cache import empty_cache
from qjax.models.decoder import Decoder


@pytest.mark.slow
@pytest.mark.parametrize("format", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("tied", [True, False])
def test_decoder_runs_packed(format, tied):
    apply, params = decoder(tied=tied)
    q = pack_decoder(params, format)
    assert not any(use.note for use in report(apply, q, TOKENS))
    assert_close(jax.jit(lift(apply))(q, TOKENS), jax.jit(apply)(dense_params(q), TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["Q4_0", "Q8_0"])
def test_decoder_runs_packed_in_bf16(format):
    apply, params = decoder(jnp.bfloat16)
    q = pack_decoder(params, format)
    got, want = jax.jit(lift(apply))(q, TOKENS), jax.jit(apply)(dense_params(q), TOKENS)
    assert_close(got, want, rtol=2e-2)  # bf16's step is 0.8 %; XLA keeps different products in f32


@pytest.mark.slow
def test_decoder_decodes_with_a_cache():
    """The cache, its traced length and a dynamic `at` go through as they are."""
    apply, params = decoder()
    q, model = pack_decoder(params, "Q4_0"), Decoder(CONFIG)

    def step(p, tokens, cache):
        return model.apply({"params": p}, tokens, cache, at=tokens.shape[1] - 1)

    run = jax.jit(lift(step))
    logits, cache = run(q, TOKENS[:, :4], empty_cache(CONFIG, 2, 8))
    last, _ = run(q, TOKENS[:, 4:], cache)
    whole = jax.jit(apply)(dense_params(q), TOKENS)
    assert_close(logits[:, 0], whole[:, 3], rtol=1e-4)
    assert_close(last[:, 0], whole[:, 4], rtol=1e-4)


def trace_seconds(fn, *args):
    """CPU time of one trace; of a new function, so that JAX's cache has no part in it."""
    start = time.process_time()
    jax.jit(lambda *a: fn(*a)).trace(*args)
    return time.process_time() - start


@pytest.mark.slow
def test_lift_costs_little_to_trace():
    apply, params = decoder(layers=12)
    q = pack_decoder(params, "Q4_0")
    pairs = [(trace_seconds(apply, params, TOKENS), trace_seconds(lift(apply), q, TOKENS)) for _ in range(5)]
    plain, lifted = (min(times) for times in zip(*pairs, strict=True))
    print(f"trace time: plain {plain:.3f} s, lifted {lifted:.3f} s, ratio {lifted / plain:.2f}")
    assert lifted < 2 * plain


def test_compiled_program_has_the_flops_of_dequantize_first():
    apply, params = decoder()
    q = pack_decoder(params, "Q4_0")

    def flops(fn):
        return jax.jit(fn).lower(q, TOKENS).compile().cost_analysis()["flops"]

    first = flops(lambda q, tokens: apply(dense_params(q), tokens))
    lifted = flops(lift(apply))
    dots = 2 * TOKENS.size * sum(w.size for w in jax.tree.leaves(q, is_leaf=qjax.is_qtensor) if qjax.is_qtensor(w))
    assert dots < first
    # The lookup decodes its rows alone: dequantize-first decodes the whole embedding for it. Nothing is added.
    assert 0.9 * first < lifted <= 1.01 * first


def test_dots_of_the_traced_program_are_those_of_the_plain_one():
    apply, params = decoder()
    q = pack_decoder(params, "Q8_0")

    def dots(jaxpr):
        shapes = []
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                shapes.append(sorted(v.aval.size for v in eqn.invars))
            chosen = {"branches": eqn.params["branches"][:1]} if eqn.primitive.name == "cond" else eqn.params
            for sub in jax.extend.core.jaxprs_in_params(chosen):  # of a choice by platform, one
                shapes += dots(getattr(sub, "jaxpr", sub))
        return shapes

    plain = dots(jax.make_jaxpr(apply)(params, TOKENS).jaxpr)
    assert sorted(dots(jax.make_jaxpr(lift(apply))(q, TOKENS).jaxpr)) == sorted(plain)
