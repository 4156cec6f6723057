"""What the libraries themselves make of qjax's files: the logits of the model that qjax reads from them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_models import SMALL, packed_model
from small_models import random_params

import qjax
from qjax.models.config import RopeScaling
from qjax.models.model import Model
from qjax.pipeline.export_gguf import export_gguf
from qjax.tensor import is_qtensor

pytestmark = pytest.mark.slow
TOKENS = np.arange(1, 25)[None]


def ours(folder, through=lambda w: w):
    """qjax's logits, packed weights as a reader has them."""
    model = qjax.load(folder)
    leaves = model.params, model.dense
    dense = jax.tree.map(lambda q, w: through(w) if is_qtensor(q) else w, *leaves, is_leaf=is_qtensor)
    return np.asarray(qjax.models.model.forward(model.config, dense, jnp.asarray(TOKENS)))


def halved(w):
    """Matrices as products rounded to fp16, which GPTQ's and AWQ's kernels without a GPU make of them."""
    return jnp.asarray(np.asarray(w).astype(np.float16).astype(np.float32))


def theirs(folder, **options):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        return model, lambda: model(torch.asarray(TOKENS)).logits.float().detach().numpy()


@pytest.mark.parametrize("name", ["int2_g32", "uint3_g64", "uint4_g32", "int8_row", "FP8_E4M3", "MXFP4", "NVFP4"])
def test_transformers_reads_compressed_tensors(tmp_path, bpe, name):
    pytest.importorskip("compressed_tensors")
    packed_model(tmp_path / "m", "compressed-tensors", name, bpe, keep="mlp/down" if name == "uint4_g32" else "nothing")
    model, logits = theirs(tmp_path / "m")
    if name in ("MXFP4", "NVFP4"):  # which it unpacks to bfloat16 at the first call, exactly
        torch = pytest.importorskip("torch")
        with pytest.raises(RuntimeError, match="dtype"):
            logits()
        torch.nn.Module.float(model)
    np.testing.assert_allclose(logits(), ours(tmp_path / "m"), atol=2e-5)


def rounding_inputs(model, largest, low, round_):
    """Have the inputs of a model's packed layers rounded in plain torch: x_hat = s q(x / s), s = max|x| / largest."""

    def hook(module, args):
        (x,) = args
        s = x.abs().amax(-1, keepdim=True) / largest
        return (round_((x / s).clamp(low, -low if low == -largest else 127)) * s,)

    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("name", ["int8_row", "FP8_E4M3"])
def test_transformers_rounds_the_inputs_of_w8a8(tmp_path, bpe, name):
    """It divides the largest by 127.5 where qjax takes 127, as vLLM does; each is what that makes in torch."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    packed_model(tmp_path / "w", "compressed-tensors", name, bpe)
    packed_model(tmp_path / "m", "compressed-tensors_w8a8", name, bpe)
    if name == "int8_row":
        scales = {"theirs": (127.5, -128, torch.round), "ours": (127, -127, torch.round)}
    else:
        scales = dict.fromkeys(("theirs", "ours"), (448, -448, lambda u: u.to(torch.float8_e4m3fn).float()))
    expected = {}
    for who, how in scales.items():
        model, logits = theirs(tmp_path / "w")
        expected["floats"] = logits()
        rounding_inputs(model, *how)
        expected[who] = logits()
    found = {"theirs": theirs(tmp_path / "m")[1](), "ours": np.asarray(qjax.load(tmp_path / "m").logits(TOKENS))}
    for who, made in found.items():
        np.testing.assert_allclose(made, expected[who], atol=2e-5)
        assert np.abs(made - expected["floats"]).max() > 1e-3


@pytest.mark.parametrize("name", ["NF4", "FP4_b32_dq"])
def test_transformers_reads_bitsandbytes(tmp_path, bpe, name):
    pytest.importorskip("bitsandbytes")
    packed_model(tmp_path / "m", "bitsandbytes", name, bpe, keep="mlp/down")
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
    packed_model(tmp_path / "m", to, name, bpe, keep="nothing" if name == "int4_g32" else "mlp/down")
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
    packed_model(tmp_path / "m", "mlx", name, bpe, keep="mlp/down")
    model, _ = mlx_lm.load(str(tmp_path / "m"))
    np.testing.assert_allclose(np.array(model(mx.array(TOKENS))), ours(tmp_path / "m"), atol=2e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("uint4_g32", {"qkv_bias": True, "tied": True, "family": "qwen2"}),
        ("int2_g16", {"qk_norm": True, "family": "qwen3"}),
        ("uint8_g64", {"rope_scaling": RopeScaling("llama3", 4.0, original_max_position=32), "layers": 2}),
    ],
)
def test_onnxruntime_runs_onnx(tmp_path, bpe, name, changes):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    config = dataclasses.replace(SMALL, **changes)
    packed_model(tmp_path / "m", "onnx", name, bpe, config=config, keep="mlp/down")
    session = onnxruntime.InferenceSession(tmp_path / "m" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input_ids": TOKENS})
    np.testing.assert_allclose(logits, ours(tmp_path / "m"), atol=2e-5)


def test_llama_cpp_reads_gguf(tmp_path, bpe, llama_cpp):
    packed_model(tmp_path / "m", "gptq", "uint4_g32", bpe)
    export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    expected = ours(tmp_path / "m")
    llm = llama_cpp(tmp_path / "m.gguf")
    llm.eval(TOKENS[0].tolist())
    found = np.array(llm.scores[: TOKENS.size])
    assert np.abs(found - expected[0]).max() < 0.05 * expected.std()  # inputs of its products are rounded to 8 bits


@pytest.fixture
def floats(tmp_path, bpe):
    qjax.save(Model(SMALL, random_params(SMALL), bpe), tmp_path / "floats")
    return tmp_path / "floats"


def format_of(folder):
    return qjax.load(folder).params["layers_0"]["mlp"]["up"]["kernel"].format.name


def test_what_bitsandbytes_writes_is_read(tmp_path, floats):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model, logits = theirs(floats, quantization_config=config)
    model.save_pretrained(tmp_path / "m")
    model.train()
    assert format_of(tmp_path / "m") == "NF4_dq"
    np.testing.assert_allclose(logits(), ours(tmp_path / "m"), atol=2e-5)


@pytest.mark.parametrize(
    ("mode", "group", "bits", "name"), [("affine", 32, 3, "uint3_g32_m_f32"), ("nvfp4", 16, 4, "NVFP4")]
)
def test_what_mlx_lm_writes_is_read(tmp_path, floats, mode, group, bits, name):
    mx, mlx_lm = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm")
    out = str(tmp_path / "m")
    mlx_lm.convert(str(floats), out, quantize=True, q_group_size=group, q_bits=bits, q_mode=mode, dtype="float32")
    model, _ = mlx_lm.load(out)
    assert format_of(tmp_path / "m") == name
    np.testing.assert_allclose(np.array(model(mx.array(TOKENS))), ours(tmp_path / "m"), atol=2e-5)


@pytest.mark.parametrize(
    ("preset", "name"), [("W4A16_ASYM", "uint4_g32_f32"), ("FP8_DYNAMIC", "FP8_E4M3"), ("NVFP4A16", "NVFP4")]
)
def test_what_compressed_tensors_writes_is_read(tmp_path, floats, preset, name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    model = transformers.AutoModelForCausalLM.from_pretrained(floats, dtype=torch.float32)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size == 128:
        scheme.weights.group_size = 32
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            w = module.weight.detach()
            peak = w.reshape(len(w), module.weight_scale.shape[-1], -1).abs().amax(-1)
            if preset == "NVFP4A16":
                shared = 448 * 6 / w.abs().max()
                module.weight_global_scale.data.fill_(shared)
                module.weight_scale.data.copy_((shared * peak / 6).to(torch.float8_e4m3fn).to(torch.float32))
            else:
                module.weight_scale.data.copy_(peak / (448 if preset == "FP8_DYNAMIC" else 7))
            if preset == "W4A16_ASYM":
                module.weight_zero_point.data.fill_(1)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "m")
    compressor.update_config(tmp_path / "m")
    reader, logits = theirs(tmp_path / "m")
    if preset == "NVFP4A16":
        with pytest.raises(RuntimeError, match="dtype"):
            logits()
        torch.nn.Module.float(reader)
    assert format_of(tmp_path / "m") == name
    made = np.asarray(qjax.load(tmp_path / "m").logits(jnp.asarray(TOKENS)))
    # weights in bfloat16 where the reader unpacks NVFP4 to it; inputs at a tie where both round them to 8 bits
    np.testing.assert_allclose(logits(), made, atol={"NVFP4A16": 3e-2, "FP8_DYNAMIC": 2e-2}.get(preset, 2e-5))
