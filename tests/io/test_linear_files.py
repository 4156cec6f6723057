"""Linear attention and experts in files: what a folder has in other orders comes back, read whole or in parts."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import LLAMA, random_params

import qjax
from qjax.errors import UserError
from qjax.io.linear_heads import order_of, qkvz_rows
from qjax.models.config import LinearAttention, RopeScaling
from qjax.models.model import Model
from qjax.pipeline.source import open_source

RULE = LinearAttention((0,), key_heads=2, value_heads=4, key_dim=16, value_dim=16, tiled=True)
QWEN3_5 = dataclasses.replace(
    LLAMA, family="qwen3_5_text", norm_eps=1e-6, norm_offset=1.0, qk_norm=True, attn_gate=True, rotary_dim=8,
    rope_sections=(2, 1, 1), linear=RULE,
)  # fmt: skip
EXPERTS = {"experts": 4, "experts_used": 2, "expert_hidden": 32, "shared_hidden": 64, "shared_gate": True}
MOE = dataclasses.replace(QWEN3_5, family="qwen3_5_moe_text", **EXPERTS)
NEXT = dataclasses.replace(
    MOE, family="qwen3_next", rope_sections=(), linear=dataclasses.replace(RULE, tiled=False), layers=2
)
GEMMA4 = dataclasses.replace(
    LLAMA, family="gemma4_text", global_head_dim=32, window=8, global_layers=(1,), local_rope_theta=100.0,
    rope_scaling=RopeScaling("proportional", part=0.5), k_eq_v=True, v_norm=True, out_scale=True, qk_norm=True,
    post_norms=True, embed_scale=True, activation="gelu_tanh", attn_multiplier=1.0, tied=True, experts=4,
    experts_used=2, expert_hidden=32, shared_hidden=LLAMA.hidden, experts_beside=True,
)  # fmt: skip
CONFIGS = [QWEN3_5, MOE, NEXT, GEMMA4]


def near(a, b):
    """Equal, but for A_log, of which a GGUF file has the exponential, and gains, to which it adds one."""
    flat, other = (jax.tree_util.tree_leaves_with_path(t) for t in (a, b))
    for (path, x), (_, y) in zip(flat, other, strict=True):
        close = 1e-6 if path[-1].key in ("A_log", "scale") else 0
        np.testing.assert_allclose(x, y, rtol=close, atol=close)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family)
def test_files_give_the_model_back(config, bpe, tmp_path):
    model = Model(config, random_params(config), bpe)
    for target in ("folder", "m.gguf"):
        qjax.save(model, tmp_path / target)
        back, opened = qjax.load(tmp_path / target), open_source(tmp_path / target)
        assert back.config == config and opened.config == config
        parts = {name: opened.part(name) for name in model.params}
        for got in (back.params, parts):
            near(got, model.params)
            if target == "folder":
                jax.tree.map(np.testing.assert_array_equal, got, model.params)


def test_what_a_folder_holds(bpe, tmp_path):
    """In the model_type's own words: conv1d of three axes, value heads by key head, qkvz in one."""
    params = random_params(QWEN3_5)
    qjax.save(Model(QWEN3_5, params, bpe), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    at, ours = "model.layers.0.linear_attn.", params["layers_0"]["linear_attn"]
    assert tensors[f"{at}conv1d.weight"].shape == (RULE.channels, 1, RULE.width)
    np.testing.assert_array_equal(tensors[f"{at}A_log"], np.asarray(ours["A_log"])[[0, 2, 1, 3]])
    np.testing.assert_array_equal(tensors[f"{at}in_proj_qkv.weight"][:64], np.asarray(ours["qkv"]["kernel"]).T[:64])
    by_head = tensors[f"{at}out_proj.weight"].reshape(LLAMA.dim, 4, 16)
    np.testing.assert_array_equal(by_head[:, [0, 2, 1, 3]].reshape(LLAMA.dim, 64), np.asarray(ours["o"]["kernel"]).T)
    assert order_of("model.layers.0.linear_attn.norm.weight", RULE) is None

    rows = np.array([[f"{part}{head}" for part in ("q", "k", "v", "v", "z", "z")] for head in "01"]).reshape(-1)
    qkv, z = (rows[at // 16] for at in (np.concatenate(qkvz_rows(RULE))[: RULE.channels], qkvz_rows(RULE)[1]))
    assert [str(name) for name in qkv[::16]] == ["q0", "q1", "k0", "k1", "v0", "v0", "v1", "v1"]
    assert [str(name) for name in z[::16]] == ["z0", "z0", "z1", "z1"]


def test_blocks_that_guess_further_tokens_are_passed_over_and_others_are_told(bpe, tmp_path):
    qjax.save(Model(NEXT, random_params(NEXT), bpe), tmp_path / "m")
    file, name = tmp_path / "m" / "model.safetensors", "model.layers.0.linear_attn.in_proj_qkvz.weight"
    tensors = load_file(file)
    save_file(tensors | {"mtp.fc.weight": np.zeros((2, 2), np.float32)}, file)
    assert qjax.load(tmp_path / "m").config == NEXT
    for changed, message in (
        ({"else.weight": np.zeros((2, 2), np.float32)}, "'else.weight' belongs to nothing in a qwen3_next"),
        ({name: tensors[name][1:]}, r"qkvz.weight' has shape \[191, 64\]; config.json asks for 192 rows"),
        (
            {name.replace("in_proj_qkvz", "conv1d"): tensors[name]},
            r"conv1d.weight' has shape \[192, 64\]; .* \[128, 4\]",
        ),
    ):
        save_file(tensors | changed, file)
        with pytest.raises(UserError, match=message):
            qjax.load(tmp_path / "m")
    save_file(tensors, file)
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(settings | {"linear_num_value_heads": 8}))
    with pytest.raises(UserError, match=r"has shape \[192, 64\]; config.json asks for 320 rows"):
        qjax.load(tmp_path / "m")
