"""Experts in files: a tensor for each in a folder, one stack in the tree and in a GGUF file, routers in float32."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_models import LLAMA, random_params

import qjax
from qjax.errors import UserError
from qjax.evaluate import llamacpp
from qjax.io.gguf_read import read_gguf
from qjax.io.gguf_write import TensorInfo, write_gguf
from qjax.models.families import config_from_gguf, weight_names
from qjax.models.model import Model
from qjax.pipeline import quantize_file, quantize_params
from qjax.pipeline.source import open_source

MIXTRAL = dataclasses.replace(LLAMA, family="mixtral", experts=4, experts_used=2, expert_hidden=96)
QWEN2_MOE = dataclasses.replace(
    MIXTRAL, family="qwen2_moe", qkv_bias=True, expert_norm=False, shared_hidden=32, shared_gate=True, hidden=64
)
DEEPSEEK = dataclasses.replace(
    MIXTRAL, family="deepseek_v3", norm_eps=1e-6, kv_heads=4, head_dim=32, rotary_dim=16, value_dim=32, kv_rank=32,
    query_rank=32, rope_pairs=True, router="sigmoid", router_bias=True, expert_scale=2.5, expert_groups=2,
    expert_groups_used=1, expert_group_best=2, dense_layers=(0,), shared_hidden=96,
)  # fmt: skip
GPT_OSS = dataclasses.replace(
    MIXTRAL, family="gpt_oss", qkv_bias=True, o_bias=True, sinks=True, expert_bias=True, activation="clamped_swiglu",
    hidden=96, window=8, global_layers=(1,),
)  # fmt: skip
LLAMA4 = dataclasses.replace(
    MIXTRAL, family="llama4_text", router="sigmoid", expert_norm=False, expert_inputs=True, rope_pairs=True, layers=4,
    shared_hidden=96, dense_layers=(0, 2), nope_layers=(3,), chunk=8192, qk_unit=True, growth=0.1,
)  # fmt: skip
IDS = np.array([[0, *range(7, 400, 5)]])


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.fixture(params=[MIXTRAL, QWEN2_MOE, DEEPSEEK, GPT_OSS, LLAMA4], ids=lambda config: config.family)
def model(request, bpe):
    return Model(request.param, random_params(request.param), bpe)


@pytest.fixture
def mixtral(bpe):
    return Model(MIXTRAL, random_params(MIXTRAL), bpe)


def test_both_files_give_the_model_back(model, tmp_path):
    for target in ("m.gguf", "folder"):
        qjax.save(model, tmp_path / target)
        back = qjax.load(tmp_path / target)
        assert back.config == model.config
        equal(back.params, model.params)


def test_a_folder_has_a_tensor_for_each_expert(mixtral, tmp_path):
    qjax.save(mixtral, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    stack = np.asarray(mixtral.params["layers_1"]["mlp"]["experts"]["down"]["kernel"])
    for i in range(4):
        np.testing.assert_array_equal(tensors[name.format(i)], stack[i].T)
    del tensors[name.format(2)]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"experts\.2\.w2\.weight' is missing"):
        qjax.load(tmp_path / "m")
    save_file(tensors | {name.format(2): stack[2]}, file)
    with pytest.raises(
        UserError, match=r"experts\.2\.w2\.weight' has shape \[96, 64\]; config.json asks for \[64, 96\]"
    ):
        qjax.load(tmp_path / "m")
    save_file(tensors | {name.format(2): stack[2].T.astype(np.float16)}, file)
    with pytest.raises(UserError, match=r"w2\.weight' have different types, F16 and F32"):
        open_source(tmp_path / "m")


def test_what_lies_beside_a_published_deepseek(bpe, tmp_path):
    """A layer that guesses the token after the next is passed over where it is announced; FP8 is told."""
    model = Model(DEEPSEEK, random_params(DEEPSEEK), bpe)
    qjax.save(model, tmp_path / "m")
    file, settings = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    tensors, said = load_file(file), json.loads(settings.read_text())
    save_file(tensors | {"model.layers.2.eh_proj.weight": np.zeros((4, 4), np.float32)}, file)
    with pytest.raises(UserError, match=r"layers\.2\.eh_proj\.weight' belongs to nothing in a deepseek_v3 model"):
        qjax.load(tmp_path / "m")
    settings.write_text(json.dumps(said | {"num_nextn_predict_layers": 1}))
    equal(qjax.load(tmp_path / "m").params, model.params)
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    save_file(tensors | {name: np.zeros((1, 1), np.float32)}, file)
    with pytest.raises(UserError, match=r"o_proj\.weight_scale_inv' belongs to weights in blocks of FP8"):
        qjax.load(tmp_path / "m")


@pytest.mark.slow
def test_transformers_folder_is_read(model, tmp_path):
    """What save_pretrained writes, from its fused tensors in memory, is the layout of published models."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    qjax.save(model, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(model.logits(IDS), expected, atol=1e-4 * np.abs(expected).max())
    theirs.save_pretrained(tmp_path / "theirs")
    back = qjax.load(tmp_path / "theirs")
    equal(back.params, model.params)


def test_a_gguf_file_has_stacks_and_float_routers(model, tmp_path):
    qjax.save(model, tmp_path / "m.gguf", dtype="bfloat16")
    file = read_gguf(tmp_path / "m.gguf")
    assert file.entry("blk.1.ffn_down_exps.weight").shape == (4, 64, 96)
    assert file.entry("blk.1.ffn_down_exps.weight").type == "BF16"
    assert file.entry("blk.1.ffn_gate_inp.weight").type == "F32"
    assert file.metadata[f"{file.metadata['general.architecture']}.expert_count"] == 4
    assert file.metadata[f"{file.metadata['general.architecture']}.expert_used_count"] == 2


def test_the_gate_of_the_shared_expert_may_be_a_vector(bpe, tmp_path):
    """llama.cpp's own files have it so."""
    model = Model(QWEN2_MOE, random_params(QWEN2_MOE), bpe)
    qjax.save(model, tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    infos = [
        TensorInfo(e.name, e.shape[1:] if "inp_shexp" in e.name else e.shape, e.type) for e in file.tensors.values()
    ]
    write_gguf(tmp_path / "v.gguf", file.metadata, infos, [file.raw(i.name) for i in infos])
    assert read_gguf(tmp_path / "v.gguf").entry("blk.0.ffn_gate_inp_shexp.weight").shape == (64,)
    equal(qjax.load(tmp_path / "v.gguf").params, model.params)
    equal(open_source(tmp_path / "v.gguf").part("layers_0"), model.params["layers_0"])


def test_packed_stacks_keep_their_bytes(mixtral, tmp_path):
    params, report = quantize_params(mixtral.params, "Q8_0")
    kept = {line.name: line.kept for line in report.tensors if line.kept not in (None, "a vector")}
    assert kept == {f"layers_{i}/mlp/router/kernel": "a router" for i in range(2)}
    q = Model(mixtral.config, params, mixtral.tokenizer)
    qjax.save(q, tmp_path / "q.gguf")
    back = qjax.load(tmp_path / "q.gguf")
    equal(back.params, params)
    down = params["layers_0"]["mlp"]["experts"]["down"]["kernel"]
    np.testing.assert_array_equal(
        np.asarray(down.leaves["blocks"])[3].reshape(-1),
        np.asarray(read_gguf(tmp_path / "q.gguf").raw("blk.0.ffn_down_exps.weight")).reshape(4, -1)[3],
    )
    np.testing.assert_array_equal(back.logits(IDS), q.logits(IDS))


@pytest.mark.parametrize("target", ["folder", "m.gguf"])
def test_streamed_bytes_are_those_in_memory(model, target, tmp_path):
    qjax.save(model, tmp_path / target)
    source = open_source(tmp_path / target)
    for name in ("layers_1", "head"):
        equal(source.part(name), model.params[name])
    report = quantize_file(tmp_path / target, tmp_path / "q.gguf", qjax.plan.Plan((qjax.plan.Rule("*", "Q8_0"),)))
    assert {t.kept for t in report.tensors} == {None, "a vector", "a router"}
    params, _ = quantize_params(model.params, "Q8_0")
    equal(qjax.load(tmp_path / "q.gguf").params, params)
    assert read_gguf(tmp_path / "q.gguf").entry("blk.1.ffn_gate_inp.weight").type == "F32"
    assert len({w.gguf for w in weight_names(model.config)}) == len(report.tensors)


def test_importance_of_experts_is_llama_cpps(mixtral, llama_cpp, tmp_path):
    """llama-quantize takes the rows of a stack's importance for its matrices in the same order: with each it loses
    less, where that row says it matters, than without."""
    qjax.save(mixtral, tmp_path / "m.gguf")
    rng = np.random.default_rng(0)
    names = [f"blk.{i}.ffn_{part}_exps.weight" for i in range(2) for part in ("gate", "up", "down")]
    importance = {n: rng.lognormal(0, 2, (4, 96 if "down" in n else 64)).astype(np.float32) for n in names}
    llamacpp.quantize(tmp_path / "m.gguf", tmp_path / "theirs.gguf", "Q4_0", importance)
    quantize_file(tmp_path / "m.gguf", tmp_path / "ours.gguf", "Q4_0", importance=importance)
    quantize_file(tmp_path / "m.gguf", tmp_path / "plain.gguf", "Q4_0")
    files = {kind: read_gguf(tmp_path / f"{kind}.gguf") for kind in ("m", "theirs", "ours", "plain")}
    for name in names:
        w, v = files["m"].array(name), importance[name][:, None]
        decoded = {kind: np.asarray(qjax.dequantize(files[kind].qtensor(name))) for kind in ("theirs", "ours", "plain")}
        lost = {kind: (v * (w - q) ** 2).sum(axis=(1, 2)) for kind, q in decoded.items()}  # [experts]
        assert (lost["theirs"] < 0.9 * lost["plain"]).all() and (lost["ours"] < 1.02 * lost["theirs"]).all()


def test_blocks_that_guess_further_tokens_are_passed_over(bpe, tmp_path):
    """Published GLM-4.5 files count them among the blocks; what is made of one has none."""
    changes = {"family": "glm4_moe", "rope_pairs": False, "query_rank": 0, "kv_rank": 0, "value_dim": 0}
    config = dataclasses.replace(
        DEEPSEEK, expert_groups=0, expert_groups_used=0, qk_norm=True, rotary_dim=16, kv_heads=2, **changes
    )
    model = Model(config, random_params(config), bpe)
    qjax.save(model, tmp_path / "m.gguf")
    file = read_gguf(tmp_path / "m.gguf")
    infos = [TensorInfo(e.name, e.shape, e.type) for e in file.tensors.values()]
    arrays = [file.raw(info.name) for info in infos]
    blocks = config.layers + 1
    more = {"glm4moe.block_count": blocks, "glm4moe.nextn_predict_layers": 1}
    with pytest.raises(UserError, match="nextn_predict_layers = 9; expected fewer than the 3 blocks"):
        config_from_gguf(dict(file.metadata) | more | {"glm4moe.nextn_predict_layers": 9})
    guess = TensorInfo(f"blk.{config.layers}.nextn.eh_proj.weight", (4, 8), "F32")
    for said, passes in ((more, True), ({"glm4moe.block_count": config.layers}, False)):
        raw = np.zeros(4 * 8 * 4, np.uint8)
        write_gguf(tmp_path / "v.gguf", file.metadata | said, [*infos, guess], [*arrays, raw])
        if not passes:
            with pytest.raises(UserError, match=r"nextn\.eh_proj\.weight' belongs to nothing"):
                qjax.load(tmp_path / "v.gguf")
            continue
        back = qjax.load(tmp_path / "v.gguf")
        assert back.config == config
        equal(back.params, model.params)
        qjax.quantize_file(tmp_path / "v.gguf", tmp_path / "q.gguf", "Q8_0")
        made = read_gguf(tmp_path / "q.gguf").metadata
        assert made["glm4moe.block_count"] == config.layers and "glm4moe.nextn_predict_layers" not in made
        assert qjax.load(tmp_path / "q.gguf").config == config
