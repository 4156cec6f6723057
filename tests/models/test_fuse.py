"""What is fused changes no logit: every edge, folded norms, rotations, all of it together, in qjax and llama.cpp."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import tiny, tiny_tokens

import qjax
from qjax.errors import UserError
from qjax.models import stdlib_text
from qjax.models.fuse import fold_norms, fuse_scale, rotate_residual, rotate_values, rotated
from qjax.models.graph import edges
from qjax.models.model import Model, forward
from qjax.models.stages import stages_of

# Llama with and without groups, biases of q, k, v, norms of q and k, windows.
ROTATABLE = ["llama", "llama-mha", "llama-tied-llama3", "qwen2", "qwen2-window", "qwen3", "qwen3-window", "gemma1"]
ROTATABLE += ["qwen2_moe"]
LATENT = ["deepseek_v2"]  # values and keys are one weight
GATED = ["qwen3_5"]  # number by number, behind values and behind linear attention
SCALABLE = [*ROTATABLE, *LATENT, *GATED, "mistral", "gemma2", "gemma3", "gemma4"]


def model(name):
    """A config of `tiny`, gains away from 1; or Gemma 1: gains minus one, scaled embeddings, no post norms."""
    if name != "gemma1":
        return tiny(name)
    config, params = tiny("gemma2-no-caps")
    for i in range(config.layers):
        params[f"layers_{i}"] = {k: v for k, v in params[f"layers_{i}"].items() if not k.endswith("post_norm")}
    return dataclasses.replace(config, family="gemma", post_norms=False, kv_heads=2), params


def orthogonal(n, seed=0):
    """x -> x Q^T with a random Q, f32[n, n]."""
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0].astype(np.float32)
    return lambda x: jnp.matmul(x, jnp.asarray(q.T), precision="highest")


def scales(n, seed=0):
    return np.exp(np.random.default_rng(seed).uniform(np.log(0.2), np.log(5), n)).astype(np.float32)


def edge_into(config, path):
    """The edge whose channels a weight contracts."""
    return next(edge for edge in edges(config) if path in edge.sinks)


def leaves(params):
    return {jax.tree_util.keystr(k): np.array(v) for k, v in jax.tree_util.tree_leaves_with_path(params)}


def moved(before, after, least=0.01):
    """The paths whose values changed by more than a share of their size."""
    before, after = leaves(before), leaves(after)
    return {k for k in before if k not in after or np.abs(before[k] - after[k]).max() > least * np.abs(before[k]).max()}


def check_same(config, params, new_config, new_params, bound=1e-5):
    tokens = tiny_tokens(config)
    expected = np.asarray(forward(config, params, tokens))
    got = np.asarray(forward(new_config, new_params, tokens))
    assert got.dtype == np.float32 and np.abs(expected).max() > 0.5
    assert np.linalg.norm(got - expected) < bound * np.linalg.norm(expected)
    np.testing.assert_allclose(got, expected, atol=bound * np.abs(expected).max(), rtol=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SCALABLE)
def test_scaling_an_edge(name):
    config, params = model(name)
    before = leaves(params)
    first = [e for e in edges(config) if not e.name.startswith("layers_1")]
    for edge in first:
        scaled = fuse_scale(params, config, edge, scales(edge.channels))
        touched = {edge.source, *edge.sinks, *([edge.bias] if edge.bias else [])}
        assert len(moved(params, scaled)) == len(touched)
        check_same(config, params, config, scaled)
    for path, leaf in leaves(params).items():
        np.testing.assert_array_equal(leaf, before[path])  # the input is not modified


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", SCALABLE)
def test_scaling_every_edge(name):
    config, params = model(name)
    scaled = params
    for seed, edge in enumerate(edges(config)):
        scaled = fuse_scale(scaled, config, edge, scales(edge.channels, seed))
    check_same(config, params, config, scaled)


def test_consumers_are_multiplied_and_the_producer_divided():
    config, params = model("llama")
    edge = edge_into(config, "layers_1/mlp/down/kernel")
    d = scales(edge.channels)
    old, new = params["layers_1"]["mlp"], fuse_scale(params, config, edge, d)["layers_1"]["mlp"]
    np.testing.assert_allclose(new["down"]["kernel"], np.asarray(old["down"]["kernel"]) * d[:, None], rtol=1e-6)
    np.testing.assert_allclose(new["up"]["kernel"], np.asarray(old["up"]["kernel"]) / d, rtol=1e-6)
    np.testing.assert_array_equal(new["gate"]["kernel"], old["gate"]["kernel"])


def test_the_bias_of_v_goes_along():
    config, params = model("qwen2")
    config = dataclasses.replace(config, kv_heads=config.heads)
    for i in range(config.layers):
        attn = params[f"layers_{i}"]["attn"]
        for part in ("k", "v"):
            attn[part] = {k: jnp.concatenate([v, 0.5 * v], axis=-1) for k, v in attn[part].items()}
    edge = edge_into(config, "layers_0/attn/o/kernel")
    d = scales(edge.channels)
    scaled = fuse_scale(params, config, edge, d)
    bias = np.asarray(params["layers_0"]["attn"]["v"]["bias"])
    np.testing.assert_allclose(scaled["layers_0"]["attn"]["v"]["bias"], bias / d, rtol=1e-6)
    check_same(config, params, config, scaled)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SCALABLE)
def test_folding_norms(name):
    config, params = model(name)
    folded, new_config = fold_norms(params, config, untie=config.tied)
    assert new_config == dataclasses.replace(config, tied=False)
    check_same(config, params, new_config, folded)
    gains = [np.asarray(folded["final_norm"]["scale"])]
    for i in range(config.layers):
        gains += [np.asarray(folded[f"layers_{i}"][norm]["scale"]) for norm in ("attn_norm", "mlp_norm")]
    np.testing.assert_array_equal(np.stack(gains), 1 - config.norm_offset)
    assert moved(params, folded)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", [*ROTATABLE, *LATENT, *GATED])
def test_rotating_the_residual(name):
    config, params = model(name)
    rotate = orthogonal(config.dim)
    turned, new_config = rotate_residual(params, config, rotate, untie=config.tied)
    assert not new_config.tied
    check_same(config, params, new_config, turned)
    still = (3 if config.qkv_bias else 0) + (2 if config.qk_norm else 0)  # biases of q, k, v, norms of q and k
    linear = 4 - still if config.linear else 0  # A_log, dt_bias, convolution and norm of its one layer in their place
    assert len(moved(params, turned)) == len(leaves(params)) - still * config.layers - linear

    # the stream itself is the old one, rotated
    tokens = tiny_tokens(config)
    old, new = (stages_of(c) for c in (config, new_config))
    x, y = old.embed(params, tokens), new.embed(turned, tokens)
    for i, name in enumerate(old.names):
        x, y = old.blocks[i](params[name], x), new.blocks[i](turned[name], y)
        np.testing.assert_allclose(y, rotate(x), atol=1e-5 * float(jnp.abs(x).max()))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [*ROTATABLE, "gemma2"])
def test_rotating_values(name):
    config, params = model(name)
    turned = rotate_values(params, config, orthogonal(config.head_dim))
    check_same(config, params, config, turned)
    changed = moved(params, turned)
    assert len(changed) == (3 if config.qkv_bias else 2) * config.layers
    assert all("['v']" in path or "['o']" in path for path in changed)


@pytest.mark.parametrize("name", ROTATABLE)
def test_all_together(name):
    config, params = model(name)
    fused = params
    for seed, edge in enumerate(edges(config)):
        fused = fuse_scale(fused, config, edge, scales(edge.channels, seed))
    fused, new_config = rotate_residual(fused, config, orthogonal(config.dim, 1), untie=config.tied)
    fused = rotate_values(fused, new_config, orthogonal(config.head_dim, 2))
    for seed, edge in enumerate(edges(new_config)):  # the edges are there again, final_norm's after untying too
        fused = fuse_scale(fused, new_config, edge, scales(edge.channels, 50 + seed))
    check_same(config, params, new_config, fused)


@pytest.mark.parametrize("name", ["qwen2", "gemma1"])  # heads of 12 and 16, a stream of 48
def test_hadamard_coordinates(name):
    config, params = model(name)
    turned = rotated(Model(config, params), seed=5, untie=config.tied)
    check_same(config, params, turned.config, turned.params)


def test_a_tied_head_without_a_gain_stays_tied():
    config, params = model("llama-tied-llama3")
    params["final_norm"] = {"scale": jnp.ones(config.dim)}
    turned, new_config = rotate_residual(params, config, orthogonal(config.dim))
    assert new_config == config and "head" not in turned
    check_same(config, params, config, turned)
    folded, new_config = fold_norms(params, config, untie=True)  # asked for is done
    assert not new_config.tied
    check_same(config, params, new_config, folded)


def test_numpy_and_narrow_floats():
    config, params = model("llama")
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for tree in (wide, narrow):
        turned, _ = rotate_residual(tree, config, orthogonal(config.dim))
        assert {str(v.dtype) for v in leaves(turned).values()} == {"float32"}
        check_same(config, jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), tree), config, turned)


@pytest.mark.parametrize("at, value", [(3, 0.0), (0, np.nan), (79, -1.0), (5, np.inf), (5, 1e-45)])
def test_bad_channels(at, value):
    config, params = model("llama")
    d = scales(config.hidden)
    d[at] = value
    edge = edge_into(config, "layers_0/mlp/down/kernel")
    with pytest.raises(UserError, match=rf"layers_0/up -> down: d of channel {at} is .*positive and finite"):
        fuse_scale(params, config, edge, d)


def test_bad_edges():
    config, params = model("llama")
    edge = edge_into(config, "layers_0/mlp/down/kernel")
    with pytest.raises(UserError, match=r"layers_0/up -> down: d has shape \[48\], its 80 channels"):
        fuse_scale(params, config, edge, scales(48))
    values = edge_into(dataclasses.replace(config, kv_heads=4), "layers_0/attn/o/kernel")
    with pytest.raises(UserError, match="layers_0/v -> o: this decoder has no such edge"):
        fuse_scale(params, config, values, scales(values.channels))


def test_a_tied_head_is_refused():
    config, params = model("llama-tied-llama3")
    for fuse in (fold_norms, lambda p, c: rotate_residual(p, c, orthogonal(c.dim))):
        with pytest.raises(UserError, match=r"final_norm's gain cannot go into a tied head.*untie=True"):
            fuse(params, config)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_post_norms_are_refused(name):
    config, params = model(name)
    with pytest.raises(UserError, match=r"gemma.* cannot be rotated: norms .* between o or down.*post_norms"):
        rotate_residual(params, config, orthogonal(config.dim), untie=True)


@pytest.mark.parametrize("name, why", [("gemma4", "values are keys as well"), ("qwen3_5", "gates multiply them")])
def test_values_that_cannot_be_rotated(name, why):
    config, params = model(name)
    with pytest.raises(UserError, match=why):
        rotate_values(params, config, orthogonal(config.head_dim))


def test_packed_missing_and_misshapen_weights():
    config, params = model("llama")
    edge = edges(config)[0]
    attn = params["layers_0"]["attn"]
    kernel = attn["q"]["kernel"]
    attn["q"] = {"kernel": qjax.quantize(kernel, "MXFP4", axis=1)}
    fuses = [
        lambda p: fuse_scale(p, config, edge, scales(edge.channels)),
        lambda p: fold_norms(p, config),
        lambda p: rotate_residual(p, config, orthogonal(config.dim)),
        lambda p: rotate_values(p, config, orthogonal(config.head_dim)),
    ]
    for fuse in fuses:
        with pytest.raises(UserError, match=r"layers_0/attn/q/kernel is packed \(MXFP4\): .* then quantize"):
            fuse(params)
    for leaf, message in [
        (None, "layers_0/attn/q/kernel is missing"),
        (kernel[:, :-1], r"layers_0/attn/q/kernel is float32\[48, 63\], by its config it is float\[48, 64\]"),
        (kernel.astype(jnp.int8), r"is int8\[48, 64\]"),
    ]:
        attn["q"] = {} if leaf is None else {"kernel": leaf}
        with pytest.raises(UserError, match=message):
            fold_norms(params, config)


def test_what_is_no_rotation():
    config, params = model("llama")
    for fuse, n, name in [(rotate_residual, config.dim, "dim"), (rotate_values, config.head_dim, "head_dim")]:
        for bad in (lambda x: x * 1.01, lambda x: jnp.sort(x, axis=-1), lambda x: x * jnp.nan, jnp.ones_like):
            with pytest.raises(UserError, match="not orthogonal"):
                fuse(params, config, bad)
        with pytest.raises(UserError, match=rf"rotate does not take vectors of length {n} \({name}\)"):
            fuse(params, config, orthogonal(7))
        with pytest.raises(UserError, match="it must keep the shape"):
            fuse(params, config, lambda x: x[..., 1:])


@pytest.fixture(scope="module")
def reference():
    return qjax.load("reference")


@pytest.fixture(scope="module")
def turned(reference):
    """The reference model with a rotated residual and rotated values."""
    return rotated(reference, seed=3, untie=True)


@pytest.fixture(scope="module")
def ids(reference):
    return jnp.array([reference.tokenizer.encode(stdlib_text.heldout_text()[:2000], bos=True)[:128]], jnp.int32)


@pytest.mark.slow
def test_the_reference_model(reference, turned, ids):
    by_hand, config = rotate_residual(reference.params, reference.config, orthogonal(reference.config.dim), untie=True)
    by_hand = rotate_values(by_hand, config, orthogonal(config.head_dim, 1))
    expected = np.asarray(reference.logits(ids))
    for other in (turned, Model(config, by_hand)):
        assert np.abs(np.asarray(other.logits(ids)) - expected).max() < 1e-5 * np.abs(expected).max()
    before, after = (np.asarray(m.params["embed"]["embedding"]) for m in (reference, turned))
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), np.linalg.norm(before, axis=1), rtol=1e-5)
    assert np.abs(after - before).max() > 0.1 * np.abs(before).max()


@pytest.mark.slow
def test_seeds_and_values_of_hadamard_coordinates(reference, turned):
    assert turned.tokenizer is reference.tokenizer and not turned.config.tied and reference.config.tied
    attn = turned.params["layers_0"]["attn"]
    again, other, plain = (
        rotated(reference, seed, values, untie=True).params["layers_0"]["attn"]
        for seed, values in [(3, True), (4, True), (3, False)]
    )
    np.testing.assert_array_equal(again["o"]["kernel"], attn["o"]["kernel"])
    assert jnp.abs(other["q"]["kernel"] - attn["q"]["kernel"]).max() > 0.01
    np.testing.assert_array_equal(plain["q"]["kernel"], attn["q"]["kernel"])
    assert jnp.abs(plain["v"]["kernel"] - attn["v"]["kernel"]).max() > 0.01
    with pytest.raises(UserError, match="tied head"):
        rotated(reference, seed=3)


@pytest.mark.slow
def test_an_outlier_channel_is_spread(reference, ids):
    """One channel of the stream is made 30 times as large; behind the rotation nothing of it stands out."""
    params = jax.tree.map(lambda x: x, reference.dense)
    loud = jnp.ones(reference.config.dim).at[7].set(30.0)
    params["embed"]["embedding"] *= loud[None, :]
    for layer in stages_of(reference.config).names:
        params[layer]["attn"]["o"]["kernel"] *= loud[None, :]
        params[layer]["mlp"]["down"]["kernel"] *= loud[None, :]
    turned, config = rotate_residual(params, reference.config, orthogonal(reference.config.dim), untie=True)

    def spread(config, params):
        """Per position and stage: max|x| over rms, and kurtosis."""
        stages = stages_of(config)
        x = stages.embed(params, ids)
        seen = [x]
        for block, name in zip(stages.blocks, stages.names, strict=True):
            seen.append(x := block(params[name], x))
        x = np.stack([np.asarray(x) for x in seen])
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
        return np.abs(x).max(axis=-1).mean(), (x**4).mean()

    peak, kurtosis = spread(reference.config, params)
    peak_after, kurtosis_after = spread(config, turned)
    assert peak > 8 and kurtosis > 50
    assert peak_after < 0.5 * peak and kurtosis_after < 0.1 * kurtosis


@pytest.mark.slow
def test_llama_cpp_reads_the_rotated_model(reference, turned, ids, tmp_path):
    if not os.environ.get("LLAMA_CPP_LIB_PATH"):
        pytest.skip("LLAMA_CPP_LIB_PATH is unset: no llama.cpp to compare with")
    pytest.importorskip("llama_cpp")
    from qjax.evaluate import llamacpp

    qjax.save(turned, tmp_path / "turned.gguf")
    theirs = next(llamacpp.logits(tmp_path / "turned.gguf", np.asarray(ids), 0))
    float_model = np.asarray(reference.logits(ids))[0, :-1]
    assert theirs.shape == float_model.shape
    assert np.abs(theirs - float_model).max() < 1e-5 * np.abs(float_model).max()  # measured: 1.3e-6
