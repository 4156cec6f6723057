"""Small models and tokenizers to write and read."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder

TEXT = """The quick brown fox jumps over the lazy dog; it's 12345 o'clock, isn't it? We'll see WHAT'S up: I'd say "no".
def f(x, *args):\n\treturn [x**2 for x in y]  # naïve Größe, 北京, мир, 🙂🎉 e\u0301\n\n\n    indented   text \r
HTTPServer/camelCase/snake_case 3.14159 1,000,000 ½ ٣٤ don't DON'T they'Re\u00a0nbsp\u3000wide  trailing   """


def columns(vocab=512):
    """Tokens, types and merges of a byte-level BPE trained on the test's own text."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 3 + TEXT.split("\n") * 5, trainer)
    merges = [" ".join(m) for m in json.loads(backend.to_str())["model"]["merges"]]
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    types = [3 if t in special else 1 for t in tokens]
    return tokens, types, merges


LLAMA = DecoderConfig(
    vocab=512, dim=64, hidden=96, layers=2, heads=4, kv_heads=2, head_dim=16, context=128, rope_theta=5000.0
)
QWEN2 = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, tied=True, norm_eps=1e-6)


def random_params(config, seed=0):
    """Params of a useful size: logits spread, biases and norms away from their initial 0 and 1."""
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(seed)

    def leaf(path, s):
        scale = {"scale": 0.2, "bias": 0.3, "embedding": 1.0}.get(
            path[-1].key, s.shape[-2] ** -0.5 if s.ndim > 1 else 1.0
        )
        centre = 1.0 - config.norm_offset if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + scale * rng.standard_normal(s.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
