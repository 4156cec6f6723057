"""A tiny Mixtral that has learned something: bytes of Python, sixty steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qjax.io.tokenizer_bpe import bpe_tokenizer
from qjax.models import stdlib_text
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model

CONFIG = DecoderConfig(
    vocab=258, dim=128, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, context=128, family="mixtral",
    experts=4, experts_used=2, expert_hidden=128,
)  # fmt: skip


def byte_tokenizer():
    """Every byte a token, no merges."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return bpe_tokenizer(["<s>", "</s>", *alphabet], [3, 3] + [1] * 256, [], "gpt-2", bos=0, eos=1, add_bos=True)


def ids_of(tokenizer, text):
    return np.array(tokenizer.encode(text), np.int32)


@functools.cache
@jax.numpy_dtype_promotion("standard")  # optax counts its steps in integers
@jax.numpy_rank_promotion("allow")
def trained(steps=60, batch=8, length=64, seed=0):
    """(Model, ids of text it did not see)."""
    tokenizer = byte_tokenizer()
    ids = ids_of(tokenizer, "".join(stdlib_text.train_text()[:40]))
    model, optimizer = Decoder(CONFIG), optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    params = model.init(jax.random.key(seed), jnp.zeros((1, 8), jnp.int32))["params"]

    @jax.jit
    def step(params, state, tokens):
        def loss(params):
            z = model.apply({"params": params}, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(z, tokens[:, 1:]).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in range(steps):
        at = rng.integers(0, len(ids) - length - 1, batch)
        params, state, value = step(params, state, ids[at[:, None] + np.arange(length + 1)])
    assert float(value) < 3.5  # a uniform guess costs 5.6
    return Model(CONFIG, params, tokenizer), ids_of(tokenizer, stdlib_text.heldout_text()[:20000]), ids
