"""What is measured and what is fed back is computed in full float32 on every backend, not in TF32 or bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import products

import qjax
from qjax.calibrate.observe import _pass
from qjax.evaluate import network, perplexity
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.parts import run
from qjax.recipes import recipe
from qjax.rounding.protocol import round_weight
from qjax.stats import Stats
from qjax.training.decoder import blockwise, finetune
from qjax.training.grid.qat import Quantized
from qjax.training.losses import chunked

CONFIG = DecoderConfig(vocab=32, dim=32, hidden=32, layers=1, heads=2, kv_heads=1, head_dim=16, context=16)
N = 256


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.fixture(scope="module")
def params():
    return jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@pytest.fixture(autouse=True)
def nothing_said_around():
    with jax.default_matmul_precision("default"):
        yield


def all_full(jaxpr, least=1):
    count, lesser = products(jaxpr)
    assert count >= least and not lesser, lesser


@pytest.mark.parametrize(
    "text",
    [
        "best_gguf:Q8_0",
        "gptq:uint4_g128",
        "autoround:int4_g32",
    ],
)
def test_rounding_and_its_losses(text):
    r = recipe(text)
    seen = {"H": shape(N, N), "cross": shape(N, N), "absmean": shape(N), "absmax": shape(N)}
    all_full(jax.make_jaxpr(lambda w, s: round_weight(w, r.format, r.roundings, Stats(**s)))(shape(4, N), seen))


def test_statistics_and_the_model_they_are_taken_of():
    def apply(params, x):
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params, x = {"a": shape(8, 16), "b": shape(16, 4)}, shape(2, 3, 8)
    all_full(jax.make_jaxpr(_pass, static_argnums=(0, 1))(apply, ("H", "h"), params, None, x), least=3)


def test_perplexity_and_divergence(params):
    decoder = perplexity.network_of_decoder(CONFIG)
    head = {"head": {"kernel": shape(32, 32)}}
    first = decoder.stages.blocks[0]
    all_full(jax.make_jaxpr(run, static_argnums=0)(first, params["layers_0"], shape(1, 8, 32)))
    one = (network.nothing_seen(4), network.nothing_seen(4)), network.nothing_apart(4)
    args = (head, head), (shape(4, 32),) * 2, shape(4, dtype=jnp.int32), 0, 0, one
    all_full(jax.make_jaxpr(network._tally, static_argnums=(0, 1))((decoder, decoder), 32, *args), least=2)


def test_losses_of_training(params):
    def loss(x, head):
        return chunked.chunked_cross_entropy(chunked.Unread(x, head, 16), jnp.zeros((4,), jnp.int32))

    all_full(jax.make_jaxpr(jax.grad(loss))(shape(4, 8), shape(8, 32)), least=2)

    def logits(params, tokens):
        return Decoder(CONFIG).apply({"params": params}, tokens)

    tokens = shape(1, 8, dtype=jnp.int32)
    all_full(jax.make_jaxpr(lambda p, t: finetune._mean_loss(logits, p, t))(params, tokens))

    def block(params, x):
        return x @ params["w"]

    params, z = {"weights": {"w": shape(8, 8)}}, shape(2, 3, 8)
    all_full(jax.make_jaxpr(blockwise._loss, static_argnums=(0, 1))(block, Quantized(), params, {}, (z, z)))


def test_dot_follows_the_caller():
    q = qjax.quantize(jnp.zeros((4, 32)), "Q8_0")
    x = np.zeros((2, 32), np.float32)
    assert products(jax.make_jaxpr(lambda x: qjax.dot(x, q))(x))[1]
    with jax.default_matmul_precision("highest"):
        all_full(jax.make_jaxpr(lambda x: qjax.dot(x, q))(x))
