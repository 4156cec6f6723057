"""gpt-oss's folders: experts in one tensor of even and odd columns, or in MXFP4 as published, read without loss."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import random_params
from test_expert_files import GPT_OSS, IDS, equal

import qjax
from qjax.errors import UserError
from qjax.io.gguf_read import read_gguf
from qjax.models.fuse import rotated
from qjax.models.model import Model
from qjax.pipeline.source import open_source
from qjax.plan import Plan, Rule
from qjax.tensor import QTensor, dequantize

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
OURS = {"gate_up": ("gate", "up"), "down": ("down",)}


@pytest.fixture
def model(bpe):
    config = dataclasses.replace(GPT_OSS, expert_hidden=64, hidden=64)
    return Model(config, random_params(config), bpe)


@pytest.fixture
def published(model, tmp_path):
    """A folder with its experts in MXFP4; (folder, {"layers_0/gate": f64[e, in, out]})."""
    qjax.save(model, tmp_path / "m")
    file, rng, values = tmp_path / "m" / "model.safetensors", np.random.default_rng(0), {}
    tensors = load_file(file)
    for i in range(2):
        for name, parts in OURS.items():
            at = f"model.layers.{i}.mlp.experts.{name}_proj"
            experts, inputs, outputs = tensors.pop(at).shape
            blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
            scales = rng.integers(118, 123, blocks.shape[:-1], np.uint8)
            tensors |= {f"{at}_blocks": blocks, f"{at}_scales": scales}
            codes = np.stack([blocks % 16, blocks // 16], axis=-1)
            w = E2M1[codes] * 2.0 ** (scales[..., None, None].astype(int) - 127)
            w = w.reshape(experts, outputs, inputs).swapaxes(1, 2)
            values |= {f"layers_{i}/{part}": w[..., j :: len(parts)] for j, part in enumerate(parts)}
    save_file(tensors, file)
    return tmp_path / "m", values


def test_float_experts_lie_as_published(model, tmp_path):
    qjax.save(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    experts = model.params["layers_1"]["mlp"]["experts"]
    at = "model.layers.1.mlp.experts"
    for j, part in enumerate(("gate", "up")):
        np.testing.assert_array_equal(tensors[f"{at}.gate_up_proj"][..., j::2], experts[part]["kernel"])
        np.testing.assert_array_equal(tensors[f"{at}.gate_up_proj_bias"][:, j::2], experts[part]["bias"])
    np.testing.assert_array_equal(tensors[f"{at}.down_proj"], experts["down"]["kernel"])
    assert not [name for name in tensors if ".up_proj" in name or ".gate_proj" in name]


def test_mxfp4_is_read_without_loss(published, model, tmp_path):
    """Into packed weights of those very values, streamed the same, into a GGUF file with the same codes."""
    folder, values = published
    loaded, source = qjax.load(folder), open_source(folder)
    for name, expected in values.items():
        layer, part = name.split("/")
        leaf = loaded.params[layer]["mlp"]["experts"][part]["kernel"]
        assert isinstance(leaf, QTensor) and leaf.format.name == "MXFP4"
        np.testing.assert_array_equal(np.asarray(dequantize(leaf), np.float64), expected)
        np.testing.assert_array_equal(source.part(layer)["mlp"]["experts"][part]["kernel"], expected)
    plan = Plan((Rule("*experts*", "MXFP4"), Rule("*", "Q8_0")))
    qjax.quantize_file(folder, tmp_path / "q.gguf", plan)
    made, file = qjax.load(tmp_path / "q.gguf"), read_gguf(tmp_path / "q.gguf")
    for layer in ("layers_0", "layers_1"):
        equal(made.params[layer]["mlp"]["experts"], loaded.params[layer]["mlp"]["experts"])
    assert file.entry("blk.0.ffn_up_exps.weight").type == "MXFP4" and file.entry("blk.0.ffn_up_exps.bias").type == "F32"
    qjax.save(loaded, tmp_path / "floats")
    back = qjax.load(tmp_path / "floats").params
    floats = jax.tree.map(
        lambda leaf: dequantize(leaf) if isinstance(leaf, QTensor) else leaf,
        loaded.params,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
    equal(back, floats)
    with pytest.raises(UserError, match="is MXFP4 already; quantizing twice"):
        qjax.quantize_file(folder, tmp_path / "q4.gguf", "Q4_0")


@pytest.mark.slow
def test_transformers_reads_the_same_weights(published, model):
    torch, mxfp4 = pytest.importorskip("torch"), pytest.importorskip("transformers.integrations.mxfp4")
    folder, values = published
    tensors = load_file(folder / "model.safetensors")
    for i in range(2):
        for name, parts in OURS.items():
            at = f"model.layers.{i}.mlp.experts.{name}_proj"
            halves = (torch.tensor(tensors[f"{at}_{kind}"]) for kind in ("blocks", "scales"))
            theirs = mxfp4.convert_moe_packed_tensors(*halves).float().numpy()
            for j, part in enumerate(parts):
                np.testing.assert_array_equal(theirs[..., j :: len(parts)], values[f"layers_{i}/{part}"])


def test_what_is_wrong_with_mxfp4_is_told(published):
    folder, _ = published
    file = folder / "model.safetensors"
    tensors, at = load_file(file), "model.layers.1.mlp.experts.down_proj"
    scales = tensors.pop(f"{at}_scales")
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"down_proj_scales' is missing; .*down_proj_blocks' is the other half"):
        qjax.load(folder)
    save_file(tensors | {f"{at}_scales": scales[:, :-1]}, file)
    with pytest.raises(UserError, match=r"down_proj_blocks' and its scales are .* no blocks of MXFP4"):
        qjax.load(folder)


def test_rotations_turn_biases_too(model):
    turned = rotated(model, 3, untie=True)
    np.testing.assert_allclose(turned.logits(IDS), model.logits(IDS), atol=2e-3)
