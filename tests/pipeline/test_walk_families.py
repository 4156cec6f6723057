"""Families whose layers differ among themselves, from a folder to a calibrated file: every leaf is in the ledger."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from tiny_walks import tiny_calibration, tiny_model

import qjax
from qjax.io.tokenizer_bpe import bpe_tokenizer
from qjax.models.config import LinearAttention, RopeScaling
from qjax.models.families import rope_tensors, weight_names
from qjax.models.model import Model
from qjax.pipeline import quantize_file
from qjax.pipeline.ledger import ledger

GEMMA4 = {
    "family": "gemma4_text", "kv_heads": 2, "global_head_dim": 32, "global_kv_heads": 1, "window": 9,
    "global_layers": (1,), "local_rope_theta": 100.0, "rope_scaling": RopeScaling("proportional", part=0.5),
    "k_eq_v": True, "v_norm": True, "out_scale": True, "qk_norm": True, "post_norms": True, "embed_scale": True,
    "activation": "gelu_tanh", "attn_multiplier": 1.0,
}  # fmt: skip


QWEN3_5 = {
    "family": "qwen3_5_text", "kv_heads": 2, "norm_eps": 1e-6, "norm_offset": 1.0, "qk_norm": True, "attn_gate": True,
    "rotary_dim": 8, "rope_sections": (2, 1, 1),
    "linear": LinearAttention((0,), key_heads=2, value_heads=4, key_dim=16, value_dim=16, tiled=True),
}  # fmt: skip
QWEN3_NEXT = {k: v for k, v in QWEN3_5.items() if k != "rope_sections"} | {
    "family": "qwen3_next", "experts": 4, "experts_used": 2, "expert_hidden": 64, "shared_hidden": 64,
    "shared_gate": True, "linear": dataclasses.replace(QWEN3_5["linear"], tiled=False),
}  # fmt: skip
GEMMA4_EXPERTS = GEMMA4 | {
    "experts": 4, "experts_used": 2, "expert_hidden": 64, "shared_hidden": 64, "experts_beside": True,
}  # fmt: skip
CASES = {"gemma4": GEMMA4, "gemma4_experts": GEMMA4_EXPERTS, "qwen3_5": QWEN3_5, "qwen3_next": QWEN3_NEXT}


def with_tokenizer(model):
    tokens = ["<s>", "</s>", *(chr(ord("!") + i) for i in range(model.config.vocab - 2))]
    made = bpe_tokenizer(tokens, [3, 3] + [1] * (len(tokens) - 2), [], "gpt-2", bos=0, eos=1, add_bos=True)
    return Model(model.config, model.params, made)


def divergence(exact, other):
    """Mean KL divergence of next-token distributions."""
    p, q = (np.asarray(jax.nn.log_softmax(x)) for x in (exact, other))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_folder_becomes_a_calibrated_file_that_llama_cpp_runs(tmp_path, changes):
    model, calibration = with_tokenizer(tiny_model(**changes)), tiny_calibration()
    qjax.save(model, tmp_path / "folder")
    source = tmp_path / "folder"
    report = quantize_file(source, tmp_path / "m.gguf", "pure:Q4_0", recipe="best_gguf", calibration=calibration)
    quantize_file(source, tmp_path / "rtn.gguf", "pure:Q4_0")
    names = {w.gguf: w for w in weight_names(model.config)}
    found = ledger(report)
    kept = {name for group in found["kept"].values() for name in group}
    done = {t.name for t in report.tensors if t.kept is None}
    assert kept | done == names.keys() | rope_tensors(model.config).keys() and not kept & done
    assert {names[name].path[-1] for name in done} == {"kernel", "embedding"}
    spared = {name for name in kept & names.keys() if names[name].path[-1] == "kernel"}
    assert {names[name].path[-2] for name in spared} <= {"router", "shared_gate"}
    assert {t.name for t in report.tensors if t.calibration is not None} == done
    if model.config.linear:
        assert found["kept"]["a convolution"] == ["blk.0.ssm_conv1d.weight"]
        assert {"blk.0.ssm_a", "blk.0.ssm_dt.bias", "blk.0.ssm_norm.weight"} <= set(found["kept"]["a vector"])
        small = "alpha" if model.config.linear.tiled else "ba"
        assert {"blk.0.attn_qkv.weight", f"blk.0.ssm_{small}.weight", "blk.0.ssm_out.weight"} <= done

    tokens = np.asarray(calibration.tokens[:4])
    exact, good, plain = (
        np.asarray(qjax.load(tmp_path / name).logits(tokens)) for name in ("folder", "m.gguf", "rtn.gguf")
    )
    assert 1e-4 < divergence(exact, good) < 0.8 * divergence(exact, plain)

    if not os.environ.get("LLAMA_CPP_LIB_PATH"):
        pytest.skip("LLAMA_CPP_LIB_PATH is unset: no llama.cpp to compare with")
    llama_cpp = pytest.importorskip("llama_cpp")
    llm = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=64, logits_all=True, n_threads=1, type_k=0, type_v=0, flash_attn=False,
        verbose=False,
    )  # fmt: skip
    llm.eval(tokens[0].tolist())
    theirs = np.array(llm.scores[: tokens.shape[1]])  # which round activations to eight bits in front of each weight
    assert np.linalg.norm(good[0] - theirs) < 0.05 * np.linalg.norm(theirs)
