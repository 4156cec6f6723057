"""Statistics and llama.cpp's importance matrices, there and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.calibrate import imatrix_of, observe, stats_of_imatrix
from qjax.errors import UserError
from qjax.io.imatrix import read_imatrix, write_imatrix
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.families import weight_names
from qjax.pipeline import quantize_params

CONFIG = DecoderConfig(vocab=96, dim=64, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=16, tied=True)


@pytest.fixture(scope="module")
def stats():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 16)), jnp.int32)
    params = Decoder(CONFIG).init(jax.random.key(0), tokens)["params"]
    return observe(lambda p, t: Decoder(CONFIG).apply({"params": p}, t), params, [tokens], kinds=("h",))


def test_there_and_back(stats, tmp_path):
    made = imatrix_of(stats, weight_names(CONFIG), ("a text",), 16)
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    blocks = {f"blk.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    assert set(made.values) == blocks | {"token_embd.weight"}
    write_imatrix(tmp_path / "im.gguf", made)
    back = stats_of_imatrix(read_imatrix(tmp_path / "im.gguf"), weight_names(CONFIG))
    for path, s in back.items():
        np.testing.assert_allclose(s.h, stats[path].h, rtol=1e-5)
        assert int(s.count) == 32


def test_experts_there_and_back(tmp_path):
    """Each expert's importance is over its own tokens, and each form of file gives it to its matrix."""
    config = dataclasses.replace(CONFIG, family="mixtral", experts=3, experts_used=2, expert_hidden=32)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 16)), jnp.int32)
    params = Decoder(config).init(jax.random.key(0), tokens)["params"]
    seen = observe(lambda p, t: Decoder(config).apply({"params": p}, t), params, [tokens], kinds=("h",))
    path, name = "layers_1/mlp/experts/down/kernel", "blk.1.ffn_down_exps.weight"
    made = imatrix_of(seen, weight_names(config), ("a text",), 16)
    assert made.values[name].shape == (3, 32) and made.counts[name].sum() == 2 * 32
    for file, legacy in ((tmp_path / "im.gguf", False), (tmp_path / "im.dat", True)):
        write_imatrix(file, made, legacy)
        back = stats_of_imatrix(read_imatrix(file), weight_names(config))[path]
        np.testing.assert_allclose(back.h, seen[path].h, rtol=1e-5)
    importance = {"w": seen[path].h}
    stack = {"w": params["layers_1"]["mlp"]["experts"]["down"]["kernel"]}
    for fmt in ("Q4_0", "int4_g32_mse"):  # in pieces, and whole
        whole = quantize_params(stack, fmt, importance)[0]["w"]
        for e in range(3):
            one = quantize_params({"w": stack["w"][e]}, fmt, {"w": importance["w"][e]})[0]["w"]
            # A sum's last bit hangs on where in a piece its block lies, and on it which of two equal scales is taken.
            assert min(np.mean(v[e] == one.leaves[k]) for k, v in whole.leaves.items()) > 0.95
            w, v = np.asarray(stack["w"][e], np.float64), np.asarray(importance["w"][e], np.float64)[:, None]
            lost = [(v * (w - np.asarray(q)) ** 2).sum() for q in (qjax.dequantize(whole)[e], qjax.dequantize(one))]
            np.testing.assert_allclose(*lost, rtol=1e-5)
        plain = quantize_params(stack, fmt)[0]["w"]
        assert not np.array_equal(qjax.dequantize(plain), qjax.dequantize(whole))


def test_another_model_is_named(stats):
    made = imatrix_of(stats, weight_names(CONFIG))
    wider = DecoderConfig(vocab=96, dim=128, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=16, tied=True)
    with pytest.raises(UserError, match=r"64.*128"):
        stats_of_imatrix(made, weight_names(wider))
    fewer = DecoderConfig(vocab=96, dim=64, hidden=128, layers=1, heads=4, kv_heads=2, head_dim=16, tied=True)
    with pytest.raises(UserError, match=r"blk\.1"):
        stats_of_imatrix(made, weight_names(fewer))
