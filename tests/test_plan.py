"""Plans: exactly one rule a weight, loud about the rest; mixes: every decision of the real llama_model_quantize."""

import ctypes
import dataclasses
import os
import re

import numpy as np
import pytest
from test_pipeline import write_model

from qjax.errors import UserError
from qjax.models.config import DecoderConfig, LinearAttention, RopeScaling
from qjax.models.families import family_of
from qjax.plan import FILE_TYPES, Plan, Rule, Weight, decoder_weights, file_type_number, mix, tensor_types

WEIGHTS = (
    Weight("embed/embedding", (512, 256), "token_embd.weight"),
    Weight("layers_0/attn/q/kernel", (256, 256), "blk.0.attn_q.weight"),
    Weight("layers_0/attn_norm/scale", (256,), "blk.0.attn_norm.weight"),
    Weight("layers_1/attn/q/kernel", (256, 256), "blk.1.attn_q.weight"),
)


def formats(plan, weights=WEIGHTS):
    return [a.format.name if a.format else a.reason for a in plan.assign(weights)]


def test_first_rule_wins_and_both_names_match():
    plan = Plan((Rule("blk.1.*", "keep"), Rule("*/kernel", "Q8_0"), Rule("re:token_embd.*", "keep")))
    assert formats(plan) == [
        "kept by rule 're:token_embd.*'",
        "Q8_0",
        "a vector",
        "kept by rule 'blk.1.*'",
    ]


def test_a_glob_of_layers():
    plan = Plan((Rule("layers_[1-3]/*", "Q8_0"), Rule("*", "keep")))
    assert formats(plan)[1] == "kept by rule '*'" and formats(plan)[3] == "Q8_0"


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("*", "keep"), ("layers_7/*", "Q8_0")], r"'layers_7/\*' -> Q8_0 matches no weight"),
        ([("*/scale", "Q8_0"), ("*", "keep")], r"'\*/scale' -> Q8_0 matches no weight"),
        ([("layers_*", "Q8_0")], r"covers embed/embedding \(token_embd.weight\)"),
        ([("*", "Q9_K")], "unknown format 'Q9_K'"),
        ([("re:(", "Q8_0")], "no regular expression"),
    ],
)
def test_mistakes_are_named(rules, message):
    with pytest.raises(UserError, match=message):
        Plan(tuple(Rule(*r) for r in rules)).assign(WEIGHTS)


def test_a_row_that_no_block_divides_is_named():
    for name, shape, said in [
        ("E8P_2", (64, 36), "36 weights are no multiple of E8P_2's block of 8"),
        ("trellis2_L8_mul1", (40, 64), "trellis2_L8_mul1 holds 16 rows together, and it has 40"),
    ]:
        with pytest.raises(UserError, match=said):
            Plan((Rule("*", name),)).assign([Weight("x", shape)])
    with pytest.raises(UserError, match=r"blk.0.x.*40 weights are no multiple of Q8_0's block of 32"):
        Plan((Rule("*", "Q8_0"),)).assign([Weight("blk.0.x", (8, 40))])


def test_toml_round_trip(tmp_path):
    plan = Plan((Rule("re:layers_\\d/.*", "Q8_0"), Rule('a"b*', "keep")), "mine")
    path = tmp_path / "plan.toml"
    path.write_text(plan.to_toml())
    assert Plan.from_toml(path) == plan
    assert hash(Plan.from_toml(path)) == hash(plan)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[rules", "is no TOML"),
        (f"rules = {'[' * 5000}{']' * 5000}", "is no TOML"),
        ('rule = "x"', "unknown key 'rule'"),
        ('name = "x"', "no rules"),
        ('[rules]\n"*" = 4', "must be a format's name, got 4"),
        ('[rules]\n"*" = "Q80"', "unknown format 'Q80'; did you mean"),
    ],
)
def test_bad_plan_files_name_file_and_key(tmp_path, text, message):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as e:
        Plan.from_toml(path)
    assert "plan.toml" in str(e.value)


def test_printing_folds_layers():
    plan = Plan(tuple(Rule(f"layers_{i}/mlp/up/kernel", "Q8_0") for i in (0, 1, 2, 5)))
    assert str(plan) == "layers_{0-2,5}/mlp/up/kernel -> Q8_0"


def test_rules_in_front_of_a_mix_are_written_and_read(tmp_path):
    """One rule a pattern: a table of TOML cannot say two things of one key."""
    plan = mix("Q4_0", config()).with_rules([Rule("layers_0/attn/v/kernel", "Q8_0"), Rule("blk.1.*", "Q5_0")])
    (tmp_path / "plan.toml").write_text(plan.to_toml())
    weights = decoder_weights(config())
    assert Plan.from_toml(tmp_path / "plan.toml") == plan == Plan.from_dict(plan.to_dict())
    chosen = {a.weight.path: a.format and a.format.name for a in plan.assign(weights)}
    assert chosen["layers_0/attn/v/kernel"] == "Q8_0" and chosen["layers_0/attn/k/kernel"] == "Q4_0"
    assert chosen["layers_1/attn/v/kernel"] == "Q5_0"
    twice = Plan((Rule("a/*", "Q8_0"), Rule("a/*", "Q4_0")))
    assert twice.to_dict()["rules"] == {"a/*": "Q8_0"} and twice.to_toml().count('"a/*"') == 1


def test_convolutions_are_spared_but_by_rules_that_name_them():
    conv, matrix = Weight("layers_0/linear_attn/conv", (64, 4)), Weight("layers_0/linear_attn/o/kernel", (64, 64))
    named = Weight("layers_1/linear_attn/conv", (64, 4), "blk.1.ssm_conv1d.weight")
    kept = Plan((Rule("*", "int4_g4"),)).assign((conv, matrix, named))
    assert [a.reason for a in kept] == ["a convolution", "", "a convolution"] and kept[1].format is not None
    rounded = Plan((Rule("*/conv", "int4_g4"), Rule("*", "Q4_0"))).assign((conv, matrix))
    assert rounded[0].format is not None and rounded[0].format.name == "int4_g4"


# --- mixes against llama.cpp ----------------------------------------------------------------------


def config(layers=2, dim=256, hidden=256, heads=8, kv_heads=8, tied=False):
    return DecoderConfig(
        vocab=64,
        dim=dim,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim // heads,
        tied=tied,
    )


def moe(family, experts, c, **changes):
    return dataclasses.replace(c, family=family, experts=experts, experts_used=2, expert_hidden=c.hidden, **changes)


CONFIGS = {
    "2 layers": config(),
    "8 layers, tied, gqa 2": config(8, kv_heads=4, tied=True),
    "16 layers, gqa 4": config(16, kv_heads=2),
    "32 layers, tied, gqa 8": config(32, kv_heads=1, tied=True),
    "22 layers, gqa 8": config(22, kv_heads=1),
    "80 layers, gqa 2": config(80, dim=32, hidden=32, heads=2, kv_heads=1),
    "80 layers, gqa 2, wide": config(80, kv_heads=4),
    "rows of 288 and 640": config(8, dim=288, hidden=640, heads=4, kv_heads=1),
    "rows of 320 and 80, tied": config(8, dim=320, hidden=80, heads=4, kv_heads=2, tied=True),
    "q, k and v in one": dataclasses.replace(config(8), family="phi3", fused_qkv=True, fused_mlp=True),
    "8 experts, 16 layers": moe("mixtral", 8, config(16, kv_heads=2)),
    "8 experts, tied": moe("mixtral", 8, config(8, kv_heads=2, tied=True)),
    "4 experts": moe("mixtral", 4, config(8, hidden=80, kv_heads=4)),
    "6 experts, one shared": moe("qwen2_moe", 6, config(16), shared_hidden=256, shared_gate=True, qkv_bias=True),
    "16 experts": moe("qwen3_moe", 16, config(9, kv_heads=1), qk_norm=True),
    "latent attention": moe(
        "deepseek_v3", 16, config(9), kv_rank=256, query_rank=256, rotary_dim=16, shared_hidden=256, dense_layers=(0,)
    ),
    "keys that are values": dataclasses.replace(
        config(8, kv_heads=4, tied=True),
        family="gemma4_text",
        global_head_dim=64,
        window=8,
        global_layers=(3, 7),
        local_rope_theta=100.0,
        rope_scaling=RopeScaling("proportional", part=0.5),
        k_eq_v=True,
        v_norm=True,
        out_scale=True,
        qk_norm=True,
        post_norms=True,
        embed_scale=True,
        activation="gelu_tanh",
        attn_multiplier=1.0,
    ),
    "linear attention": dataclasses.replace(
        config(8, kv_heads=2),
        family="qwen3_5_text",
        norm_eps=1e-6,
        norm_offset=1.0,
        qk_norm=True,
        attn_gate=True,
        rotary_dim=8,
        rope_sections=(2, 1, 1),
        linear=LinearAttention((0, 1, 2, 4, 5, 6), key_heads=4, value_heads=8, key_dim=32, value_dim=32, tiled=True),
    ),
    "rows of 40": config(4, dim=40, hidden=48, heads=2, kv_heads=2),
}


def write_gguf(path, c):
    """A model of zeros with the least metadata llama.cpp accepts."""
    import gguf

    if c.linear or c.global_head_dim:
        return write_model(path, c, "F16")
    w = gguf.GGUFWriter(path, family_of(c).arch)
    w.add_context_length(64)
    w.add_embedding_length(c.dim)
    w.add_block_count(c.layers)
    w.add_feed_forward_length(c.hidden)
    w.add_head_count(c.heads)
    w.add_head_count_kv(c.kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    if c.experts:
        w.add_expert_count(c.experts)
        w.add_expert_used_count(c.experts_used)
        w.add_expert_feed_forward_length(c.expert_hidden)
        w.add_expert_shared_feed_forward_length(c.shared_hidden)
        w.add_expert_shared_count(1)
    if c.kv_rank:
        w.add_leading_dense_block_count(len(c.dense_layers))
        w.add_q_lora_rank(c.query_rank)
        w.add_kv_lora_rank(c.kv_rank)
        w.add_rope_dimension_count(c.rotated)
    w.add_tokenizer_model("llama")
    w.add_token_list([f"t{i}" for i in range(c.vocab)])
    w.add_token_scores([0.0] * c.vocab)
    w.add_token_types([1] * c.vocab)
    for weight in decoder_weights(c):
        w.add_tensor(weight.gguf, np.zeros(weight.shape, np.float16 if len(weight.shape) > 1 else np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


@pytest.fixture(scope="module")
def llama_types():
    """(path, file type, imatrix, pure, overrides) -> {tensor: type}, as llama_model_quantize's dry run prints them."""
    if not os.environ.get("LLAMA_CPP_LIB_PATH"):
        pytest.skip("LLAMA_CPP_LIB_PATH is unset: no llama.cpp to compare with")
    llama_cpp = pytest.importorskip("llama_cpp")
    import gguf

    lines = []

    @llama_cpp.llama_log_callback
    def log(level, text, user_data):
        lines.append(text.decode(errors="replace"))

    def types(path, mix_name, has_imatrix=False, pure=False, overrides=()):
        lines.clear()
        p = llama_cpp.llama_model_quantize_default_params()
        p.ftype, p.dry_run, p.pure, p.nthread = FILE_TYPES[mix_name][0], True, pure, 1
        importance = np.ones(1, np.float32)
        entry = llama_cpp.llama_model_imatrix_data
        imatrix = (entry * 2)()
        imatrix[0].name, imatrix[0].size = b"x", 1
        imatrix[0].data = importance.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        if has_imatrix:
            p.imatrix = imatrix
        given = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()
        for slot, (pattern, kind) in zip(given, overrides, strict=False):
            slot.pattern, slot.type = pattern.encode(), gguf.GGMLQuantizationType[kind].value
        if overrides:
            p.tt_overrides = given
        llama_cpp.llama_log_set(log, ctypes.c_void_p())
        assert llama_cpp.llama_model_quantize(str(path).encode(), b"/dev/null", ctypes.byref(p)) == 0, lines[-3:]
        found = re.findall(r"\] +(\S+) +- \[.*?type = +\w+, size = .*?\((\w+)\)", "".join(lines))
        return {name: kind.upper() for name, kind in found}

    yield types
    llama_cpp.llama_log_set(ctypes.cast(None, llama_cpp.llama_log_callback), ctypes.c_void_p())


# MXFP4 is qjax's own file type; llama.cpp's MXFP4_MOE has its number.
MIXES = [m for m in FILE_TYPES if m not in ("MXFP4", "F16")]


def ours(c, *args, **options):
    shapes = {w.gguf: w.shape for w in decoder_weights(c)}
    return tensor_types(
        args[0], shapes, layers=c.layers, heads=c.heads, kv_heads=c.kv_heads, experts=c.experts, **options
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_decision_is_llama_quantizes(llama_types, tmp_path, name):
    c = CONFIGS[name]
    write_gguf(tmp_path / "m.gguf", c)
    for mix_name in MIXES:
        for has_imatrix in (False, True):
            expected = llama_types(tmp_path / "m.gguf", mix_name, has_imatrix)
            # llama.cpp says nothing of a tensor that has its type already, here F16
            got = {k: v for k, v in ours(c, mix_name, has_imatrix=has_imatrix).items() if v != "F16"}
            assert got == expected, (mix_name, has_imatrix)


def test_pure_and_overrides_are_llama_quantizes(llama_types, tmp_path):
    c = CONFIGS["16 layers, gqa 4"]
    write_gguf(tmp_path / "m.gguf", c)
    for mix_name in ("Q4_K_M", "Q3_K_M", "Q2_K_S", "TQ1_0"):
        overrides = (("blk\\.[0-3]\\.attn_v", "Q8_0"), ("ffn_down", "Q5_1"), ("token_embd", "Q4_0"))
        for options in ({"pure": True}, {"overrides": overrides[:1]}, {"overrides": overrides}):
            got = ours(c, mix_name, **options)
            assert got == llama_types(tmp_path / "m.gguf", mix_name, **options), (mix_name, options)


def test_mix_is_a_plan_of_paths():
    c = CONFIGS["8 layers, tied, gqa 2"]
    plan = mix("q4_0", c)
    assert plan.name == "Q4_0" and file_type_number(plan, {}) == 2
    by_path = {r.pattern: r.format for r in plan.rules}
    assert by_path["embed/embedding"] == "Q6_K" and by_path["layers_3/mlp/down/kernel"] == "Q4_0"
    assert "final_norm/scale" not in by_path
    assert mix("Q4_K", c) == mix("Q4_K_M", c)


def test_mix_mistakes():
    with pytest.raises(UserError, match=r"unknown file type 'Q4_X'; did you mean .*Q4_0.*known are F32"):
        mix("Q4_X", config())
    with pytest.raises(UserError, match="unknown ggml type 'Q7_0'"):
        mix("Q4_0", config(), overrides=[("attn", "Q7_0")])


def test_file_type_of_a_custom_plan_is_the_commonest():
    assert file_type_number(Plan(()), {"Q8_0": 10, "Q4_0": 100, "F32": 3}) == 2
