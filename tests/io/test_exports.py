"""Containers of other libraries: their arrays decode by numpy to the weight, come back as they were, or are refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import DECODERS
from packed_models import packed_model
from small_models import LLAMA

import qjax
from qjax.errors import UserError
from qjax.io.exports import CONTAINERS, opened
from qjax.io.exports.integers import in_ggml, integers_of
from qjax.io.onnx_graph import check_graph
from qjax.io.safetensors import DTYPE_NAMES, DTYPES, open_file, write_tensors
from qjax.models.config import RopeScaling
from qjax.pipeline.export_gguf import ggml_type
from qjax.reparam.permute import Permuted

CASES = {
    "compressed-tensors": "int2_g32 uint3_g64 int4_g128_bf16 uint4_row uint5_g32_f32 int8_row FP8_E4M3 FP8_E4M3_tensor "
    "MXFP4 NVFP4 Q4_0 Q8_0",
    "compressed-tensors_w8a8": "int8_row int8_row_bf16 FP8_E4M3",
    "gptq": "uint2_g64 uint3_g32 int4_g128 int8_row",
    "gptq_v2": "uint4_g32",
    "awq": "int4_g32 uint4_g128",
    "bitsandbytes": "NF4 NF4_b128_dq FP4_dq",
    "mlx": "uint2_g32_m uint3_g64_m_bf16 uint6_g32_m_f32 int4_g32 uint5_g64 MXFP4 NVFP4 Q4_1",
    "onnx": "int4_g32 uint2_g64 uint8_g16",
}
ALL = [(to, name) for to, names in CASES.items() for name in names.split()]
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def w():
    return np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32) / 16


def stored(folder, to, q, arrays=None):
    """A file of one weight in a container, opened: {name: Stored}, and its config."""
    one = CONTAINERS[to]
    arrays = one.tensors(q) if arrays is None else arrays
    config = one.settings({NAME: q.format}, ["lm_head"])
    infos = [(NAME + suffix, DTYPE_NAMES[a.dtype], a.shape) for suffix, a in arrays.items()]
    with open(folder / "w.safetensors", "wb") as f:
        write_tensors(f, infos, arrays.values(), DTYPES, {"format": "pt"})
    return opened(json.loads(json.dumps(config)), open_file(folder / "w.safetensors")).tensors, config


@pytest.mark.parametrize(("to", "name"), ALL)
def test_arrays_mean_the_weight_and_come_back_as_they_were(tmp_path, w, to, name):
    q = qjax.quantize(w, name)
    CONTAINERS[to].check(q.format, w.shape)
    arrays = CONTAINERS[to].tensors(q)
    tensors, config = stored(tmp_path, to, q)
    w_hat = np.asarray(qjax.dequantize(q))
    np.testing.assert_array_equal(DECODERS[to](arrays, config), w_hat)

    (one,) = tensors.values()
    assert list(tensors) == [NAME + ".weight"] and one.shape == w.shape
    assert one.nbytes == sum(a.nbytes for a in arrays.values())
    back = one.packed()
    assert back.format.name == one.dtype
    np.testing.assert_array_equal(np.asarray(qjax.dequantize(back)), w_hat)
    again = CONTAINERS[to].tensors(back)
    assert arrays.keys() == again.keys()
    for suffix, a in arrays.items():
        np.testing.assert_array_equal(np.asarray(again[suffix]).view(np.uint8), np.asarray(a).view(np.uint8), suffix)
    if back.format == q.format:
        jax.tree.map(np.testing.assert_array_equal, back.leaves, {k: np.asarray(v) for k, v in q.leaves.items()})


def test_columns_out_of_order_are_read_behind_a_permutation(tmp_path, w):
    q = qjax.quantize(w, "uint4_g32")
    arrays = CONTAINERS["gptq"].tensors(q)
    shuffled = np.random.default_rng(1).permutation(256)
    arrays |= {".g_idx": arrays[".g_idx"][shuffled]}
    tensors, config = stored(tmp_path, "gptq", q, arrays)
    back = tensors[NAME + ".weight"].packed()
    assert isinstance(back.applied[0], Permuted)
    np.testing.assert_array_equal(np.asarray(qjax.dequantize(back)), DECODERS["gptq"](arrays, config))
    again = CONTAINERS["gptq"].tensors(back)
    assert all((again[suffix] == a).all() for suffix, a in arrays.items())
    with pytest.raises(UserError, match="lies behind Permuted"):
        CONTAINERS["awq"].tensors(back)


def test_fp8_in_blocks_is_read(tmp_path):
    rng = np.random.default_rng(2)
    codes = rng.standard_normal((200, 256)).astype(DTYPES["F8_E4M3"])
    scale = rng.uniform(1, 2, (2, 2)).astype(np.float32)
    infos = [(NAME + ".weight", "F8_E4M3", codes.shape), (NAME + ".weight_scale_inv", "F32", scale.shape)]
    with open(tmp_path / "w.safetensors", "wb") as f:
        write_tensors(f, infos, [codes, scale], DTYPES, {})
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    one = opened(config, open_file(tmp_path / "w.safetensors")).tensors[NAME + ".weight"]
    expected = codes.astype(np.float32) * np.repeat(np.repeat(scale, 128, 0)[:200], 128, 1)
    np.testing.assert_array_equal(np.asarray(qjax.dequantize(one.packed())), expected)
    config["quantization_config"]["weight_block_size"] = [64, 64]
    with pytest.raises(UserError, match=r"blocks of \[64, 64\] is not read"):
        opened(config, open_file(tmp_path / "w.safetensors"))


def test_a_global_scale_of_nvfp4_is_read_and_written_back(tmp_path, w):
    one, q = CONTAINERS["compressed-tensors"], qjax.quantize(w, "NVFP4")
    arrays = one.tensors(q) | {".weight_global_scale": np.full(1, 1234.5, np.float32)}
    tensors, config = stored(tmp_path, "compressed-tensors", q, arrays)
    back = tensors[NAME + ".weight"].packed()
    expected = DECODERS["compressed-tensors"](arrays, config)
    np.testing.assert_allclose(np.asarray(qjax.dequantize(back)), expected, rtol=2e-7)
    again = one.tensors(back)
    assert all((np.asarray(again[suffix]).view(np.uint8) == a.view(np.uint8)).all() for suffix, a in arrays.items())
    with pytest.raises(UserError, match="change of variables"):
        CONTAINERS["mlx"].tensors(back)


@pytest.mark.parametrize(("type", "weight"), [("int", "I8"), ("float", "F8_E4M3")])
def test_rounded_inputs_are_read_with_their_weights(tmp_path, w, type, weight):
    q = qjax.quantize(w, "int8_row_f32" if type == "int" else "FP8_E4M3")
    codes = np.asarray(q.leaves["codes"]).reshape(w.shape)
    scale = np.asarray(q.leaves["scale"])
    codes = (codes - np.uint8(128)).view(np.int8) if type == "int" else codes.view(DTYPES[weight])
    infos = [(NAME + ".weight", weight, codes.shape), (NAME + ".weight_scale", "F32", scale.shape)]
    with open(tmp_path / "w.safetensors", "wb") as f:
        write_tensors(f, infos, [codes, scale], DTYPES, {})
    inputs = {"num_bits": 8, "type": type, "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["re:.*up_proj"], "weights": {"num_bits": 8, "type": type, "symmetric": True,
             "strategy": "channel"}, "input_activations": inputs, "format": f"{type}-quantized"}  # fmt: skip
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    back = (
        opened({"quantization_config": said}, open_file(tmp_path / "w.safetensors")).tensors[NAME + ".weight"].packed()
    )
    assert back.rounds_inputs and back.applied[0].kind == ("int8" if type == "int" else "e4m3")
    np.testing.assert_array_equal(np.asarray(qjax.dequantize(back)), np.asarray(qjax.dequantize(q)))
    with pytest.raises(UserError, match="its inputs are rounded too: --to compressed-tensors_w8a8"):
        CONTAINERS["compressed-tensors"].tensors(back)
    again = CONTAINERS["compressed-tensors_w8a8"].tensors(back)
    for found, array in zip(again.values(), (codes, scale), strict=True):
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), array.view(np.uint8))
    said_again = CONTAINERS["compressed-tensors_w8a8"].settings({NAME: back.format}, [])["quantization_config"]
    (written,) = said_again["config_groups"].values()
    assert inputs.items() <= written["input_activations"].items() and written["format"] == group["format"]
    other = dataclasses.replace(back, applied=(dataclasses.replace(back.applied[0], threshold=6.0),))
    with pytest.raises(UserError, match=r"lies behind RoundedInput; .* by token, and no more"):
        CONTAINERS["compressed-tensors_w8a8"].tensors(other)
    for change in ({"dynamic": False}, {"num_bits": 4}):
        group["input_activations"] = inputs | change
        with pytest.raises(UserError, match="only inputs in 8 bits, dynamic and token by token"):
            opened({"quantization_config": said}, open_file(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match="transform_config is not read"):
        opened({"quantization_config": said | {"transform_config": {"a": 1}}}, open_file(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("name", "type"),
    [
        ("int4_g128", "Q4_0"),
        ("uint3_g32", "Q4_0"),
        ("uint4_g64", "Q5_0"),
        ("int7_g32", "Q8_0"),
        ("int8_row", "Q8_0"),
    ],
)
def test_ggml_types_hold_integers_exactly_or_not_at_all(w, name, type):
    q = qjax.quantize(w, name)
    assert ggml_type(q.format) == type
    made = in_ggml(integers_of(q), qjax.format(type))
    np.testing.assert_array_equal(np.asarray(qjax.dequantize(made)), np.asarray(qjax.dequantize(q)))


def test_what_no_ggml_type_holds_is_said(w):
    for name in ("uint8_g32", "int4_g16", "NF4", "uint4_g64_m"):
        with pytest.raises(UserError, match=r"no ggml type holds|no grid of integers"):
            ggml_type(qjax.format(name))
    with pytest.raises(UserError, match="its f32 scales are no fp16 numbers"):
        in_ggml(integers_of(qjax.quantize(w, "int4_g32_f32")), qjax.format("Q4_0"))
    with pytest.raises(UserError, match="reach from -15 to"):
        in_ggml(integers_of(qjax.quantize(-np.abs(w), "uint4_g32")), qjax.format("Q4_0"))


REFUSED = [
    ("gptq", "uint4_g64_bf16", "under f16 scales, not uint4_g64_bf16; take uint4_g128"),
    ("gptq", "uint5_g64", "2, 3, 4 or 8 bits"),
    ("gptq", "NF4", "no grid of integers"),
    ("awq", "uint3_g64", "4 bits in groups"),
    ("awq", "uint4_row", "4 bits in groups"),
    ("bitsandbytes", "int4_g64", "take NF4, NF4_dq"),
    ("mlx", "uint4_g16", "groups of 32, 64 or 128"),
    ("mlx", "Q4_K", "no grid of integers"),
    ("onnx", "uint3_g32", "2, 4 or 8 bits"),
    ("onnx", "int4_g24", "a power of two"),
    ("compressed-tensors", "int3_g16_u6x16", "no place for int3_g16_u6x16"),
    ("compressed-tensors", "int2_g64_mid_mse", "no place for int2_g64_mid_mse"),
    ("compressed-tensors", "uint4_g64_zf16", "no place for uint4_g64_zf16"),
    ("compressed-tensors_w8a8", "int8_g64", "no place for int8_g64; take int8_row or FP8_E4M3"),
    ("compressed-tensors_w8a8", "uint8_row", "no place for uint8_row"),
]


@pytest.mark.parametrize(("to", "name", "why"), REFUSED)
def test_what_a_container_cannot_hold_is_said_from_the_format_alone(to, name, why):
    with pytest.raises(UserError, match=why):
        CONTAINERS[to].check(qjax.format(name), (64, 256))


def test_a_zero_of_zero_has_no_form_in_gptq_and_one_in_its_second_version(w):
    q = qjax.quantize(np.abs(w), "uint4_g32")
    with pytest.raises(UserError, match="gptq_v2"):
        CONTAINERS["gptq"].tensors(q)
    config = CONTAINERS["gptq_v2"].settings({NAME: q.format}, [])
    made = DECODERS["gptq_v2"](CONTAINERS["gptq_v2"].tensors(q), config)
    np.testing.assert_array_equal(made, np.asarray(qjax.dequantize(q)))


def test_one_config_for_several_formats_or_a_refusal():
    formats = {"a": qjax.format("int4_g32"), "b": qjax.format("uint8_g64"), "c": qjax.format("int4_g32")}
    groups = CONTAINERS["compressed-tensors"].settings(formats, [])["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["a", "c"], ["b"]]
    said = CONTAINERS["mlx"].settings(formats, [])["quantization"]
    assert (said["bits"], said["b"]["bits"], "a" in said) == (4, 8, False)
    for name in ("gptq", "awq", "bitsandbytes"):
        with pytest.raises(UserError, match=r"one format for all its weights, and these have int4_g32, uint8_g64; "):
            CONTAINERS[name].settings(formats, [])


DAMAGES = {
    "compressed-tensors": (".weight_scale", ".weight_packed"),
    "gptq": (".qzeros", ".qweight"),
    "awq": (".scales", ".qzeros"),
    "bitsandbytes": (".weight.quant_map", ".weight.absmax"),
    "mlx": (".biases", ".scales"),
    "onnx": (".weight_scales", ".weight_Q"),
}


@pytest.mark.parametrize("to", DAMAGES)
def test_damaged_weights_are_named(tmp_path, w, to):
    q = qjax.quantize(w, "NF4" if to == "bitsandbytes" else "int4_g32")
    whole = CONTAINERS[to].tensors(q)
    missing, other = DAMAGES[to]
    with pytest.raises(UserError, match=rf"up_proj{missing}' is missing"):
        stored(tmp_path, to, q, {k: a for k, a in whole.items() if k != missing})
    with pytest.raises(UserError, match=rf"tensor '{NAME}{other}' has type U16; expected"):
        stored(tmp_path, to, q, whole | {other: whole[other].astype(np.uint16)})
    shorter = whole[other][:, :-1] if other == ".weight_packed" else whole[other][:-1]
    with pytest.raises(UserError, match=rf"'{NAME}.*(has shape|has 64 rows of 31 words|row of 248 weights)"):
        stored(tmp_path, to, q, whole | {other: shorter})
    if ".weight" not in whole:
        with pytest.raises(UserError, match=rf"the weight of '{NAME}' is there twice"):
            stored(tmp_path, to, q, whole | {".weight": w})
    scale = next(s for s in (".scales", ".weight_scale", ".weight_scales", ".weight.absmax") if s in whole)
    tensors, _ = stored(tmp_path, to, q, whole | {scale: np.full_like(whole[scale], np.nan)})
    with pytest.raises(UserError, match=r"NaN or infinite"):
        tensors[NAME + ".weight"].packed()


def test_a_quantization_that_is_not_read_is_said(tmp_path, w):
    stored(tmp_path, "gptq", qjax.quantize(w, "int4_g32"))
    checkpoint = open_file(tmp_path / "w.safetensors")
    for said, why in [
        ({"quant_method": "aqlm"}, "'aqlm' are not read"),
        ("q4", "'q4' are not read"),
        ({"quant_method": "gptq", "bits": "four", "group_size": 32}, "bits = 'four' is not read"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "compressed-tensors"}, "no config_groups"),
    ]:
        with pytest.raises(UserError, match=why):
            opened({"quantization_config": said}, checkpoint)


def test_a_folder_in_shards_is_one_model(tmp_path, bpe):
    packed = packed_model(tmp_path / "a", "compressed-tensors", "int4_g32", bpe)
    packed_model(tmp_path / "b", "compressed-tensors", "int4_g32", bpe, shard_bytes=20_000)
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 3
    a, b = (qjax.load(tmp_path / name) for name in "ab")
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    q = a.params["layers_0"]["mlp"]["up"]["kernel"]
    assert q.axis == -2 and q.format.name == "int4_g32"
    jax.tree.map(np.testing.assert_array_equal, q.leaves, packed["layers_0/mlp/up/kernel"].leaves)
    assert a.logits(jnp.arange(8)[None]).shape == (1, 8, 512)


def test_the_table_of_the_docs_is_what_the_code_holds():
    page = (Path(__file__).parents[2] / "docs" / "exports.md").read_text()
    head, _, *rows = [
        line.strip("| ").split("|") for line in page.split("## What holds what")[1].split("\n\n")[1].split("\n")
    ]
    assert [cell.strip() for cell in head[1:]] == list(CONTAINERS)
    assert len(rows) > 15
    for name, *cells in ([cell.strip() for cell in row] for row in rows):
        cells += [""] * (len(CONTAINERS) - len(cells))
        for to, cell in zip(CONTAINERS.values(), cells, strict=True):
            try:
                to.check(qjax.format(name), (512, 512))
                held = "yes"
            except UserError:
                held = ""
            assert held == cell, f"{name} in {to.name}"


def test_a_graph_that_is_not_whole_is_refused(tmp_path, bpe):
    pytest.importorskip("onnx")
    packed_model(tmp_path / "m", "onnx", "int4_g32", bpe)
    data = tmp_path / "m" / "model.onnx.data"
    whole = data.read_bytes()
    assert qjax.load(tmp_path / "m").params["layers_0"]["attn"]["q"]["kernel"].format.name == "int4_g32_f32"
    data.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"does not lie in model\.onnx\.data whole"):
        qjax.load(tmp_path / "m")
    data.write_bytes(whole)
    graph = tmp_path / "m" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-7] + b"nothing")
    with pytest.raises(UserError, match=r"model\.onnx"):
        qjax.load(tmp_path / "m")


def test_there_is_no_graph_of_every_decoder():
    check_graph(LLAMA)
    for change in ({"window": 8}, {"experts": 4}, {"logit_softcap": 30.0}, {"rope_scaling": RopeScaling("yarn", 2.0)}):
        with pytest.raises(UserError, match=f"no ONNX graph of a llama model with {next(iter(change))}"):
            check_graph(dataclasses.replace(LLAMA, **change))
