"""Phi-3's rotary tables, which a GGUF file holds as tensors, in a file that is quantized from a folder."""

import jax.numpy as jnp
import numpy as np
from tiny_families import tiny

import qjax
from qjax.io.gguf_read import read_gguf
from qjax.io.tokenizer_bpe import bpe_tokenizer
from qjax.models.model import Model
from qjax.pipeline import quantize_file
from qjax.plan import Plan, Rule


def test_a_folder_with_longrope_is_quantized_with_both_tables(tmp_path):
    config, params = tiny("phi3-longrope")
    tokens = ["<s>", "</s>", *(chr(ord("!") + i) for i in range(config.vocab - 2))]
    tokenizer = bpe_tokenizer(tokens, [3, 3] + [1] * (len(tokens) - 2), [], "gpt-2", bos=0, eos=1, add_bos=True)
    qjax.save(Model(config, params, tokenizer), tmp_path / "folder")
    quantize_file(tmp_path / "folder", tmp_path / "q.gguf", Plan((Rule("*", "keep"),)))
    assert {"rope_factors_long.weight", "rope_factors_short.weight"} <= set(read_gguf(tmp_path / "q.gguf").tensors)
    ids = jnp.arange(config.context - 2)[None] % config.vocab
    got, expected = (qjax.load(tmp_path / name).logits(ids) for name in ("q.gguf", "folder"))
    np.testing.assert_allclose(got, expected, atol=1e-4)
