"""The reference model in llama.cpp: every mix loads, has llama-quantize's types and size, and gives qjax's logits."""

import ctypes

import numpy as np
import pytest

import qjax
from qjax.io.checkpoint import locate
from qjax.io.gguf_read import read_gguf
from qjax.models import stdlib_text
from qjax.pipeline import quantize_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ids():
    tokenizer = qjax.load("reference").tokenizer
    return tokenizer.encode(stdlib_text.heldout_text()[:2000], bos=True)[:128]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Mix -> GGUF file of the reference model, each written once."""
    folder = tmp_path_factory.mktemp("reference")
    made = {}

    def write(mix):
        if mix not in made:
            made[mix] = folder / f"{mix}.gguf"
            quantize_file("reference", made[mix], mix)
        return made[mix]

    return write


def their_quantize(source, out, ftype):
    import llama_cpp as bindings

    params = bindings.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = ftype, True, 2
    assert bindings.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0


def their_logits(llm, ids):
    llm.reset()
    llm.eval(ids)
    return np.array(llm.scores[: len(ids)])


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_float_logits_agree(llama_cpp, files, ids):
    ours = np.asarray(qjax.load("reference").logits(np.array([ids])))[0]
    assert distance(ours, their_logits(llama_cpp(files("F32")), ids)) < 1e-3


FREE = ["F32", "Q8_0", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ3_M"]  # which llama.cpp makes without an imatrix


@pytest.mark.parametrize("mix", [*FREE, "IQ3_XXS", "IQ2_M", "IQ2_XXS", "IQ1_M", "IQ1_S"])
def test_mix_loads_and_agrees(mix, llama_cpp, files, ids, tmp_path):
    import llama_cpp as bindings

    # packed: the same model, but for the bytes llama.cpp rounds activations to
    ours = np.asarray(qjax.load(files(mix)).logits(np.array([ids])))[0]
    assert distance(ours, their_logits(llama_cpp(files(mix)), ids)) < 0.05
    # unpacked to F32 by llama.cpp itself: the same numbers
    their_quantize(files(mix), tmp_path / "f32.gguf", bindings.LLAMA_FTYPE_ALL_F32)
    assert distance(ours, their_logits(llama_cpp(tmp_path / "f32.gguf"), ids)) < 1e-3
    if mix not in FREE:
        return
    # the same types tensor by tensor, and the same number of bytes
    number = read_gguf(files(mix)).metadata["general.file_type"]
    their_quantize(files("F32"), tmp_path / "theirs.gguf", number)
    a, b = (
        {name: (t.type, t.nbytes) for name, t in read_gguf(path).tensors.items()}
        for path in (files(mix), tmp_path / "theirs.gguf")
    )
    assert a == b
    assert locate("reference").is_dir()
