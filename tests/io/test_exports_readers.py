"""What the libraries themselves make of qjax's files: the logits of the model that qjax reads from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_models import packed_model

import qjax

pytestmark = pytest.mark.slow
TOKENS = np.arange(1, 25)[None]


def ours(folder, through=lambda w: w):
    """qjax's logits, packed weights as a reader has them."""
    model = qjax.load(folder)
    dense = {name: jax.tree.map(through, part) if "layers" in name else part for name, part in model.dense.items()}
    return np.asarray(qjax.models.model.forward(model.config, dense, jnp.asarray(TOKENS)))


def halved(w):
    """Matrices as products rounded to fp16, which GPTQ's and AWQ's kernels without a GPU make of them."""
    return w if w.ndim < 2 else jnp.asarray(np.asarray(w).astype(np.float16).astype(np.float32))


def theirs(folder, **options):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        return model, lambda: model(torch.asarray(TOKENS)).logits.float().detach().numpy()


@pytest.mark.parametrize("name", ["int2_g32", "uint3_g64", "uint4_g32", "int8_row", "FP8_E4M3", "MXFP4", "NVFP4"])
def test_transformers_reads_compressed_tensors(tmp_path, bpe, name):
    pytest.importorskip("compressed_tensors")
    packed_model(tmp_path / "m", "compressed-tensors", name, bpe)
    model, logits = theirs(tmp_path / "m")
    if name in ("MXFP4", "NVFP4"):  # which it unpacks to bfloat16 at the first call, exactly
        torch = pytest.importorskip("torch")
        with pytest.raises(RuntimeError, match="dtype"):
            logits()
        torch.nn.Module.float(model)
    np.testing.assert_allclose(logits(), ours(tmp_path / "m"), atol=2e-5)


@pytest.mark.parametrize("name", ["NF4", "FP4_b32_dq"])
def test_transformers_reads_bitsandbytes(tmp_path, bpe, name):
    pytest.importorskip("bitsandbytes")
    packed_model(tmp_path / "m", "bitsandbytes", name, bpe)
    model, logits = theirs(tmp_path / "m")
    model.train()  # else a CPU with bfloat16 of its own repacks the weights, and rounds absmaxes
    np.testing.assert_allclose(logits(), ours(tmp_path / "m"), atol=2e-5)


@pytest.mark.parametrize(
    ("to", "name"), [("gptq", "uint3_g32"), ("gptq", "int4_g32"), ("gptq_v2", "uint4_g32"), ("awq", "uint4_g32")]
)
def test_gptqmodel_reads_gptq_and_awq(tmp_path, bpe, monkeypatch, to, name):
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
    pytest.importorskip("gptqmodel")
    transformers = pytest.importorskip("transformers")
    packed_model(tmp_path / "m", to, name, bpe)
    if to == "awq":
        config = transformers.AwqConfig(bits=4, backend="torch_awq")
    else:
        config = transformers.GPTQConfig(bits=int(name[-5]), backend="gptq_torch")
    _, logits = theirs(tmp_path / "m", device_map="cpu", quantization_config=config)
    tolerance = 5e-3 if to == "awq" else 2e-5  # its kernel computes in fp16
    np.testing.assert_allclose(logits(), ours(tmp_path / "m", halved), atol=tolerance)


@pytest.mark.parametrize("name", ["uint3_g32_m_f32", "uint5_g32", "MXFP4", "NVFP4"])
def test_mlx_lm_reads_mlx(tmp_path, bpe, name):
    mx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    packed_model(tmp_path / "m", "mlx", name, bpe)
    model, _ = mlx_lm.load(str(tmp_path / "m"))
    np.testing.assert_allclose(np.array(model(mx.array(TOKENS))), ours(tmp_path / "m"), atol=2e-5)
