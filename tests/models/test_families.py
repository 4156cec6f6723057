"""config.json and GGUF metadata to DecoderConfig and back; clear errors for what is not supported."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_families import TINY

from qjax.errors import UserError
from qjax.models.config import DecoderConfig, RopeScaling
from qjax.models.families import (
    FAMILIES,
    config_from_gguf,
    config_from_hf,
    config_to_gguf,
    config_to_hf,
    rope_tensors,
    weight_names,
)

# As published (the keys that matter).
LLAMA_31_8B = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
PUBLISHED = {"llama-3.1-8b": LLAMA_31_8B, "gemma-3-1b": GEMMA_3_1B}


@pytest.mark.parametrize("name", [*TINY, *PUBLISHED])
def test_config_json_round_trip(name):
    hf = (TINY | PUBLISHED)[name]
    config = config_from_hf(hf)
    written = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(written) == config
    assert config_to_hf(config_from_hf(written)) == written
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "model_type"):
        assert written[key] == hf[key]
    if "rope_scaling" in hf and hf["rope_scaling"] is not None and "rope_type" in hf["rope_scaling"]:
        assert written["rope_scaling"] == hf["rope_scaling"]


def test_published_configs_mean_what_their_papers_say():
    llama = config_from_hf(LLAMA_31_8B)
    assert (llama.head_dim, llama.tied, llama.window) == (128, False, None)
    assert llama.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    gemma = config_from_hf(GEMMA_3_1B)
    assert gemma.tied and gemma.qk_norm and gemma.post_norms and gemma.norm_offset == 1.0
    assert [i for i in range(26) if gemma.layer_window(i) is None] == [5, 11, 17, 23]
    assert gemma.layer_theta(5)[0] == 1e6 and gemma.layer_theta(6)[0] == 1e4


def test_both_spellings_of_rope_agree():
    old = TINY["gemma3"]
    new = {k: v for k, v in old.items() if not k.startswith("rope")}
    new["rope_parameters"] = {
        "full_attention": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 100.0, "rope_type": "default"},
    }
    assert config_from_hf(new) == config_from_hf(old)
    old = TINY["llama-tied-llama3"] | {"rope_theta": 77.0}
    new = {k: v for k, v in old.items() if not k.startswith("rope")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": 77.0}
    assert config_from_hf(new) == config_from_hf(old)


def as_stored(meta):
    """What a GGUF reader gives back: floats have passed through float32."""
    return {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in meta.items()}


UNSAYABLE = {
    "gemma2-no-caps": "attn_softcap = None",  # llama.cpp always caps these
    "qwen3-yarn-betas": r"beta_fast = 32 and beta_slow = 1 only, got 4 and 0.5",
    "qwen2_moe-mixed": "experts in every layer of a qwen2_moe; layer 0 of this model has none",
    "deepseek_v2-lite": "groups of experts by their two best",
    "deepseek_v3-yarn": "deepseek2 with a rotary scaling",
    "llama4": r"nope_layers = \(1,\)",
    "gpt_oss-windows": "a window in every second layer",
}


@pytest.mark.parametrize("name", [*TINY, *PUBLISHED])
def test_gguf_round_trip(name):
    config = config_from_hf((TINY | PUBLISHED)[name])
    if config.query_dim is not None:  # llama.cpp derives it, so the file cannot say it
        with pytest.raises(UserError, match="query_dim = 24"):
            config_to_gguf(config)
        config = dataclasses.replace(config, query_dim=None)
    if name in UNSAYABLE:
        with pytest.raises(UserError, match=UNSAYABLE[name]):
            config_to_gguf(config)
        return
    meta = config_to_gguf(config)
    back = config_from_gguf(
        as_stored(meta),
        tied=config.tied,
        biased=config.qkv_bias,
        normed=config.qk_norm,
        k_eq_v=config.k_eq_v,
        rope=rope_tensors(config),
    )
    if name == "mistral-full":
        back = dataclasses.replace(back, family="mistral")
    if config.rope_scaling is not None and config.rope_scaling.original_max_position == 32:
        assert back.rope_scaling.kind == "table"  # not one of the published scalings: kept as numbers
        for tensor, table in rope_tensors(config).items():
            np.testing.assert_array_equal(rope_tensors(back)[tensor], table)
        back = dataclasses.replace(back, rope_scaling=config.rope_scaling)
    if (wanted := config.rope_scaling) is not None and wanted.kind in ("yarn", "longrope"):
        np.testing.assert_allclose(back.rope_scaling.attention_factor, wanted.attention_factor, rtol=1e-6)
        back = dataclasses.replace(
            back, rope_scaling=dataclasses.replace(back.rope_scaling, attention_factor=wanted.attention_factor)
        )
    assert back == config


def test_gguf_keys_and_names_are_ggufs_own():
    """Every key and tensor name is one that gguf's tables list for the architecture."""
    gguf = pytest.importorskip("gguf")
    templates = set()
    for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.SSM, gguf.Keys.General):
        templates |= {v for k, v in vars(group).items() if isinstance(v, str) and not k.startswith("_")}
    templates.add("{arch}.attention.recurrent_layers")  # llama.cpp's, not in this package's tables yet
    arch_by_name = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}
    for name, hf in TINY.items():
        if name in UNSAYABLE:
            continue
        config = dataclasses.replace(config_from_hf(hf), query_dim=None)
        meta = config_to_gguf(config)
        arch = meta["general.architecture"]
        assert {key.replace(f"{arch}.", "{arch}.", 1) for key in meta} <= templates | {"general.architecture"}
        known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[arch_by_name[arch]]}
        for weight in weight_names(config):
            parts = weight.gguf.removesuffix(".weight").removesuffix(".bias").split(".")
            if parts[0] == "blk":
                parts[1] = "{bid}"
            named = ".".join(parts).removesuffix(".scale")
            beside = arch == "gemma4" and named.endswith(("ffn_gate_exps", "ffn_up_exps"))  # llama.cpp reads them too
            assert named in known or beside, weight.gguf


def test_weight_names_of_a_llama_and_a_gemma():
    llama = {w.path: w for w in weight_names(config_from_hf(TINY["llama"]))}
    q = llama["layers_1", "attn", "q", "kernel"]
    assert (q.hf, q.gguf) == ("model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight")
    assert (q.shape, q.transposed, q.rope_heads, q.offset) == ((48, 64), True, 4, 0.0)
    assert llama["layers_1", "attn", "k", "kernel"].rope_heads == 2
    assert llama["layers_1", "attn", "v", "kernel"].rope_heads is None
    assert llama["layers_0", "mlp_norm", "scale"].hf == "model.layers.0.post_attention_layernorm.weight"
    assert llama["head", "kernel"].gguf == "output.weight" and not llama["embed", "embedding"].transposed

    gemma = {w.path: w for w in weight_names(config_from_hf(TINY["gemma3"]))}
    assert ("head", "kernel") not in gemma
    assert gemma["layers_0", "mlp_norm", "scale"].hf == "model.layers.0.pre_feedforward_layernorm.weight"
    assert gemma["layers_0", "attn_post_norm", "scale"].gguf == "blk.0.post_attention_norm.weight"
    assert gemma["layers_0", "attn", "q_norm", "scale"].offset == 1.0
    assert gemma["layers_0", "attn", "q", "kernel"].rope_heads is None

    qwen = {w.path: w for w in weight_names(config_from_hf(TINY["qwen2"]))}
    assert qwen["layers_1", "attn", "k", "bias"].hf == "model.layers.1.self_attn.k_proj.bias"
    assert qwen["layers_1", "attn", "k", "bias"].shape == (24,)


def test_deepseeks_spelling_of_yarn():
    """Equal mscale and mscale_all_dim, as published, leave what is rotated as long as it was, and sharpen scores."""
    rope = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16}
    config = config_from_hf(TINY["deepseek_v3"] | {"rope_scaling": rope})
    assert config.rope_scaling.attention_factor == 1.0 and config.rope_scaling.mscale == 1.0
    assert config.score_scale == pytest.approx(18**-0.5 * (1 + 0.1 * np.log(40)) ** 2)
    assert config_from_hf(config_to_hf(config)) == config


def test_weight_names_of_experts():
    """One stack in the tree and in a GGUF file; a tensor for each expert in a folder."""
    mixtral = {w.path: w for w in weight_names(config_from_hf(TINY["mixtral"]))}
    down = mixtral["layers_1", "mlp", "experts", "down", "kernel"]
    assert down.gguf == "blk.1.ffn_down_exps.weight" and not down.stays_float
    assert (down.shape, down.file_shape, down.hf_shape) == ((4, 80, 48), (4, 48, 80), (48, 80))
    assert down.hf_names[3] == "model.layers.1.block_sparse_moe.experts.3.w2.weight" and len(down.hf_names) == 4
    router = mixtral["layers_0", "mlp", "router", "kernel"]
    assert (router.hf, router.stays_float) == ("model.layers.0.block_sparse_moe.gate.weight", True)
    qwen = {w.path: w for w in weight_names(config_from_hf(TINY["qwen2_moe-mixed"]))}
    assert qwen["layers_0", "mlp", "up", "kernel"].hf == "model.layers.0.mlp.up_proj.weight"
    assert (
        qwen["layers_1", "mlp", "experts", "up", "kernel"].hf_names[2] == "model.layers.1.mlp.experts.2.up_proj.weight"
    )
    assert qwen["layers_1", "mlp", "shared_gate", "kernel"].hf_shape == (1, 48)


def test_published_llama3_scaling_survives_gguf_as_a_formula():
    config = config_from_hf(LLAMA_31_8B)
    divisors = rope_tensors(config)["rope_freqs.weight"]
    assert divisors.shape == (64,) and divisors[0] == 1.0 and divisors[-1] == 8.0
    back = config_from_gguf(config_to_gguf(config), rope_freqs=divisors)
    assert config_to_hf(back)["rope_scaling"] == LLAMA_31_8B["rope_scaling"]
    assert rope_tensors(config_from_hf(TINY["llama-linear"])) == {}


def test_gguf_defaults_are_llama_cpps():
    meta = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 48,
        "llama.attention.head_count": np.uint32(4),
        "llama.attention.head_count_kv": [2, 2],
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "tokenizer.ggml.tokens": ["a", "b", "c"],
    }
    assert config_from_gguf(meta, tied=True) == DecoderConfig(3, 32, 48, 2, 4, 2, 8, context=64, tied=True)


def test_head_sizes_llama_cpp_cannot_load():
    with pytest.raises(UserError, match="4 x 16 and 48"):
        config_to_gguf(config_from_hf(TINY["qwen2"] | {"head_dim": 16}))


def test_gemma_27b_scores_are_llama_cpps():
    """llama.cpp knows the 27B Gemmas, whose scores are over sqrt(dim / heads), by their number of layers."""
    hf = TINY["gemma2-no-caps"] | {"num_hidden_layers": 46, "query_pre_attn_scalar": 12}
    config = config_from_hf(hf | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0})
    assert config.query_dim == 12.0
    assert config_from_gguf(config_to_gguf(config), tied=True) == config
    with pytest.raises(UserError, match="query_dim"):
        config_to_gguf(dataclasses.replace(config, query_dim=None))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: llama, mistral"),
        ({"model_type": "gemma3"}, 'no text_config; its language model alone is "gemma3_text"'),
        ({"model_type": "kimi_linear"}, "'kimi_linear' is not supported: linear attention with a gate for each"),
        (TINY["qwen3_5"] | {"linear_num_value_heads": 3}, "3 value heads are no multiple of 2 key heads"),
        (TINY["qwen3_5"] | {"linear_key_head_dim": 1 << 30}, "more than any model has"),
        (TINY["qwen3_5"] | {"attn_output_gate": False}, "attn_output_gate = False is not supported"),
        (TINY["qwen3_5"] | {"linear_conv_kernel_dim": 1}, "width 1 sees no token before"),
        (
            TINY["qwen3_5"] | {"layer_types": ["sliding_attention"] * 2},
            "expected one of full_attention, linear_attention",
        ),
        (TINY["qwen3_5"] | {"layer_types": None, "full_attention_interval": 0}, "full_attention_interval = 0"),
        (
            TINY["qwen3_5"] | {"rope_parameters": {"mrope_section": [1]}},
            r"mrope_section = \[1\]; expected three numbers",
        ),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "9 experts a token are more than the 8 there are"),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [2]},
            r"mlp_only_layers = \[2\]; expected a list of layers below 2",
        ),
        ({"model_type": "qwen2_moe", "qkv_bias": False}, "qkv_bias = False"),
        (TINY["deepseek_v2"] | {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'; expected greedy or group"),
        (TINY["deepseek_v3"] | {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05 is not supported"),
        (TINY["deepseek_v3"] | {"num_key_value_heads": 2}, "num_key_value_heads differs"),
        (TINY["deepseek_v3"] | {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        (
            TINY["gemma4"] | {"hidden_size_per_layer_input": 8},
            "= 8 is not supported .* embeddings by layer",
        ),
        (TINY["gemma4"] | {"num_kv_shared_layers": 1}, "keys and values of other layers are missing"),
        (TINY["gemma4"] | {"enable_moe_block": True}, "num_experts is missing"),
        (TINY["gemma4"] | {"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
        (TINY["gemma4"] | {"layer_types": ["full_attention", "sliding_attention"]}, "ends with sliding_attention"),
        (TINY["gemma4"] | {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config is not supported but"),
        (TINY["gemma4"] | {"per_layer_config": {"1": {"head_dim": 0}}}, "per_layer_config.head_dim = 0"),
        (TINY["gemma4"] | {"per_layer_config": {"1": {"hidden_size": 8}}}, "and only head_dim, num_key_value_heads"),
        (TINY["gemma4"] | {"global_head_dim": 15}, "head size 15 is odd"),
        (TINY["gemma4"] | {"num_global_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": []}, r"model_type \[\]"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_scaling.rope_type = 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": 1}}, "rope_scaling.truncate = 1"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type = 'longrope'"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "longrope"}},
            "rope_scaling.long_factor = None; expected a list",
        ),
        ({"model_type": "phi3", "partial_rotary_factor": 0.2}, "rotates 3 of 16 numbers"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"no_rope_layers = \[1\]; expected 0 or 1 for each layer"),
        ({"model_type": "smollm3", "use_sliding_window": True}, "use_sliding_window = True"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling = 0"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'; expected an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"hidden_size": None}, "hidden_size is missing; expected a positive integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"vocab_size": "many"}, "vocab_size = 'many'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
        ({"num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
        ({"model_type": "mistral", "sliding_window": 2**31}, "sliding_window = 2147483648 is more than any model has"),
        ({"head_dim": 15}, "head size 15 is odd"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked_attention"] * 2}, "chunked_att"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        ({"model_type": "gemma2", "layer_types": 3}, "layer_types = 3; expected a list"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1}, "attn_logit_softcapping = -1"),
    ],
)
def test_config_json_mistakes(change, message):
    with pytest.raises(UserError, match=message):
        config_from_hf(TINY["llama"] | change)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"general.architecture": "rwkv7"},
            "general.architecture = 'rwkv7' is not supported; supported: deepseek2, gemma, gemma2",
        ),
        ({"general.architecture": None}, "general.architecture = None"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": "two"}, "llama.block_count = 'two'"),
        ({"llama.expert_count": 8}, "expert_used_count is missing"),
        (
            {"general.architecture": "qwen3", "qwen3.expert_count": 8},
            "expert_count = 8 is not supported; expected none",
        ),
        ({"general.architecture": "qwen3moe"}, "expert_count = 0 is not supported; expected some"),
        ({"llama.rope.scaling.type": "dynamic"}, "rope.scaling.type = 'dynamic'"),
        ({"llama.rope.scaling.type": "longrope"}, "'rope_factors_long.weight' is missing"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count = 8 differs from the head size 16"),
        ({"llama.attention.value_length": 8}, "value_length = 8"),
        ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv differs between layers"),
        ({"llama.attention.head_count_kv": []}, "head_count_kv"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.rope.freq_base": -1.0}, "rope.freq_base = -1.0"),
        ({"llama.attention.sliding_window": "wide"}, "sliding_window = 'wide'"),
        (
            {"llama.attention.sliding_window": 4, "llama.attention.sliding_window_pattern": [True]},
            "sliding_window_pattern has 1 entries for 2 layers",
        ),
        (
            {"llama.attention.sliding_window": 4, "llama.attention.sliding_window_pattern": "x"},
            "sliding_window_pattern = 'x'",
        ),
    ],
)
def test_gguf_mistakes(change, message):
    meta = config_to_gguf(config_from_hf(TINY["llama"])) | change
    with pytest.raises(UserError, match=message):
        config_from_gguf({k: v for k, v in meta.items() if v is not None})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"embedding_length_per_layer_input": 8}, "embedding_length_per_layer_input = 8 is not supported"),
        ({"attention.shared_kv_layers": 1}, "shared_kv_layers = 1 is not supported"),
        ({"attention.head_count_kv": [2, 1, 1]}, "head_count_kv has 3 entries for 2 layers"),
        ({"expert_count": 4}, "expert_used_count is missing"),
    ],
)
def test_gguf_mistakes_of_gemma4(change, message):
    config = config_from_hf(TINY["gemma4"])
    meta = config_to_gguf(config) | {f"gemma4.{key}": value for key, value in change.items()}
    with pytest.raises(UserError, match=message):
        config_from_gguf(meta, tied=True, k_eq_v=True, rope=rope_tensors(config))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention.recurrent_layers": [True]}, r"recurrent_layers = \[True\]; expected one boolean a layer"),
        ({"ssm.inner_size": 33}, "ssm.inner_size = 33 is no multiple of 4 heads"),
        ({"ssm.state_size": 0}, "ssm.state_size = 0"),
        ({"rope.dimension_sections": [1]}, r"dimension_sections = \[1\]; expected three numbers"),
    ],
)
def test_gguf_mistakes_of_linear_attention(change, message):
    meta = config_to_gguf(config_from_hf(TINY["qwen3_5"])) | {f"qwen35.{key}": value for key, value in change.items()}
    with pytest.raises(UserError, match=message):
        config_from_gguf(meta)


def test_linear_attention_that_llama_cpp_cannot_run():
    config = config_from_hf(TINY["qwen3_5"])
    for change, message in (
        ({"linear": dataclasses.replace(config.linear, value_dim=16)}, "one size for keys and values .*, not 8 and 16"),
        ({"norm_eps": 1e-5}, "one eps for all norms"),
        ({"linear": None}, "has layers of linear attention"),
    ):
        with pytest.raises(UserError, match=message):
            config_to_gguf(dataclasses.replace(config, **change))
    assert config_to_gguf(config)["qwen35.full_attention_interval"] == 2
    irregular = config_to_gguf(config_from_hf(TINY["qwen3_5-irregular"]))
    assert irregular["qwen35.attention.recurrent_layers"] == [False, True, True]


def test_layers_of_gemma4_have_sizes_of_their_own():
    config = config_from_hf(TINY["gemma4"])
    assert [(c.head_dim, c.kv_heads, c.k_eq_v) for c in map(config.of_layer, (0, 1))] == [(16, 2, False), (24, 1, True)]
    assert config.of_layer(1).of_layer(1) == config.of_layer(1)
    shapes = {"/".join(w.path): w.shape for w in weight_names(config)}
    assert shapes["layers_0/attn/v/kernel"] == (48, 32) and "layers_1/attn/v/kernel" not in shapes
    assert shapes["layers_1/attn/k/kernel"] == (48, 24) and shapes["layers_1/attn/o/kernel"] == (96, 48)
    still = rope_tensors(config)["rope_freqs.weight"]
    np.testing.assert_array_equal(still, np.repeat(np.float32([1, 1e30]), 6))  # half of a larger head's 12
    with pytest.raises(UserError, match="a proportional part"):
        config_to_gguf(dataclasses.replace(config, rope_scaling=None))
    with pytest.raises(UserError, match="has windows"):
        config_to_gguf(dataclasses.replace(config, window=None, global_layers=(), local_rope_theta=None))


@pytest.mark.parametrize("bad", [np.ones(7), np.zeros(8), np.full(8, np.nan)])
def test_bad_rope_freqs(bad):
    meta = config_to_gguf(config_from_hf(TINY["llama"]))
    with pytest.raises(UserError, match=r"rope_freqs.weight: expected 8 positive numbers"):
        config_from_gguf(meta, rope_freqs=bad)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_cannot_say_is_an_error(family):
    sizes = {"query_pre_attn_scalar": 12, "head_dim": 12, "hidden_size_per_layer_input": 0}
    other = TINY["llama"] | sizes | {"model_type": family}
    own = next(hf for hf in TINY.values() if hf["model_type"] == family)
    plain = config_from_hf(own if family.startswith(("deepseek", "qwen3_")) and family != "qwen3_moe" else other)
    wrong = {"norm_offset": 0.5} if family.startswith("gemma") else {"post_norms": not plain.post_norms}
    for write in (config_to_hf, config_to_gguf):
        with pytest.raises(UserError, match=next(iter(wrong))):
            write(dataclasses.replace(plain, **wrong))
        with pytest.raises(UserError, match="family 'unknown'"):
            write(dataclasses.replace(plain, family="unknown"))
    with pytest.raises(UserError, match="window"):
        config_to_hf(dataclasses.replace(config_from_hf(TINY["llama"]), window=8))
