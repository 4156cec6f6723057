"""Small models and tokenizers as fixtures, and the real llama.cpp to read what is written."""

import os

import pytest
from small_models import LLAMA, QWEN2, TEXT, columns, random_params

from qjax.io.tokenizer_bpe import bpe_tokenizer
from qjax.models.model import Model


@pytest.fixture(scope="session")
def varied_text():
    return TEXT


@pytest.fixture(scope="session")
def bpe_columns():
    return columns()


@pytest.fixture(scope="session")
def bpe(bpe_columns):
    return bpe_tokenizer(*bpe_columns, "gpt-2", bos=0, eos=1, add_bos=True)


@pytest.fixture(params=["llama", "qwen2"])
def small_model(request, bpe):
    config = {"llama": LLAMA, "qwen2": QWEN2}[request.param]
    return Model(config, random_params(config), bpe)


@pytest.fixture
def llama_model(bpe):
    return Model(LLAMA, random_params(LLAMA), bpe)


@pytest.fixture(scope="session")
def llama_cpp():
    """llama-cpp-python on the real llama.cpp; the function loads a file with float caches and all logits."""
    if not os.environ.get("LLAMA_CPP_LIB_PATH"):
        pytest.skip("LLAMA_CPP_LIB_PATH is unset: no llama.cpp to compare with")
    module = pytest.importorskip("llama_cpp")

    def open_(path, n_ctx=128):
        return module.Llama(
            str(path),
            n_ctx=n_ctx,
            n_batch=n_ctx,
            logits_all=True,
            n_threads=1,
            n_threads_batch=1,
            type_k=0,
            type_v=0,
            flash_attn=False,
            verbose=False,
        )

    return open_
