"""The real llama.cpp computes what the decoder computes, for every family: metadata, names, norms, rope, windows."""

import dataclasses
import os

import numpy as np
import pytest
from tiny_families import LENGTH, TINY, tiny, tiny_tokens

import qjax
from qjax.io.tokenizer_bpe import bpe_tokenizer
from qjax.models.model import Model, forward

# Windows of other families than Gemma and OLMo 3 are not llama.cpp's business: it attends to everything.
IGNORED = ("mistral", "qwen2-window", "qwen3-window", "phi3")
# It always caps Gemma 2's logits, has its own numbers of YaRN, and wants experts in every layer.
SAYABLE = [name for name in TINY if name not in ("gemma2-no-caps", "qwen3-yarn-betas", "qwen2_moe-mixed")]
# It ranks groups of experts as DeepSeek-V3 does, has other factors of scores under YaRN, and windows, and layers that
# rotate nothing, in places of its own.
UNSAYABLE = ("deepseek_v2-lite", "deepseek_v3-yarn", "gpt_oss-windows", "llama4")
SAYABLE = [name for name in SAYABLE if name not in UNSAYABLE]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAYABLE)
def test_logits_equal_llama_cpp(name, tmp_path):
    if not os.environ.get("LLAMA_CPP_LIB_PATH"):
        pytest.skip("LLAMA_CPP_LIB_PATH is unset: no llama.cpp to compare with")
    llama_cpp = pytest.importorskip("llama_cpp")
    config, params = tiny(name)
    config = dataclasses.replace(config, query_dim=None)
    tokens = ["<s>", "</s>", *(chr(ord("!") + i) for i in range(config.vocab - 2))]
    tokenizer = bpe_tokenizer(tokens, [3, 3] + [1] * (len(tokens) - 2), [], "gpt-2", bos=0, eos=1, add_bos=True)
    path = tmp_path / "m.gguf"
    qjax.save(Model(config, params, tokenizer), path)

    llm = llama_cpp.Llama(
        str(path),
        n_ctx=64,
        n_batch=64,
        logits_all=True,
        n_threads=1,
        type_k=0,
        type_v=0,
        flash_attn=False,
        verbose=False,
    )
    ids = tiny_tokens(config, batch=1)
    llm.eval(np.asarray(ids)[0].tolist())
    theirs = np.array(llm.scores[:LENGTH])
    plain = config if name not in IGNORED else dataclasses.replace(config, window=None, global_layers=())
    if name == "gpt_oss":  # the ends of YaRN's blend are at whole frequencies in llama.cpp
        plain = dataclasses.replace(config, rope_scaling=dataclasses.replace(config.rope_scaling, truncate=True))
    ours = np.asarray(forward(plain, params, ids))[0]
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)
    if name in IGNORED:
        inside = np.asarray(forward(config, params, ids))[0, : config.window]
        np.testing.assert_allclose(inside, theirs[: config.window], atol=1e-3, rtol=1e-3)

    back = qjax.load(path)
    inexact = 1e-5 if config.linear else 0  # the file has exp(A_log)
    np.testing.assert_allclose(
        forward(back.config, back.params, ids), forward(config, params, ids), rtol=0, atol=10 * inexact
    )
