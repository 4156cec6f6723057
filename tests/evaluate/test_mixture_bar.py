"""A tiny Mixtral that has learned something, as a GGUF file: llama.cpp computes what qjax does, and best_gguf's file is
nearer to the float model than imatrix's of the same bytes."""

import os

import numpy as np
import pytest
from trained_mixture import trained

import qjax
from qjax.evaluate import llamacpp
from qjax.pipeline import quantize_file
from qjax.pipeline.few_tokens import NOTE
from qjax.pipeline.windows import calibration_of

pytestmark = pytest.mark.slow
CONTEXT = 128


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    if not os.environ.get("LLAMA_CPP_LIB_PATH"):
        pytest.skip("LLAMA_CPP_LIB_PATH is unset: no llama.cpp to compare with")
    model, held, ids = trained()
    folder = tmp_path_factory.mktemp("mixture")
    qjax.save(model, folder / "f.gguf")
    windows = np.concatenate([np.zeros((16, 1), np.int32), held[: 16 * 127].reshape(16, 127)], axis=1)
    return model, folder, windows, ids


def test_float_logits_are_llama_cpps(setup):
    model, folder, windows, _ = setup
    ours = np.asarray(model.logits(windows[:2]))[:, :-1]
    theirs = np.stack(list(llamacpp.logits(folder / "f.gguf", windows[:2], 0)))
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def test_best_gguf_beats_imatrix(setup):
    model, folder, windows, ids = setup
    judge = llamacpp.judge_of(folder / "f.gguf", windows, CONTEXT // 2, folder)
    calibration = calibration_of(CONTEXT, ids[: CONTEXT * 64], context=CONTEXT)
    kl, size, lines = {}, {}, {}
    for recipe in ("imatrix", "best_gguf"):
        out = folder / f"{recipe}.gguf"
        report = quantize_file(folder / "f.gguf", out, "Q4_0", recipe=recipe, calibration=calibration)
        kl[recipe], size[recipe] = llamacpp.judge_file(judge, out).kl_mean, out.stat().st_size
        lines[recipe] = {t.name: t for t in report.tensors}
    assert size["best_gguf"] == size["imatrix"]
    assert 0 < kl["best_gguf"] < 0.5 * kl["imatrix"] < 0.05
    routers = {f"blk.{i}.ffn_gate_inp.weight" for i in range(model.config.layers)}
    assert {name for name, t in lines["best_gguf"].items() if t.kept != "a vector" and t.kept} == routers
    experts = [t.calibration for name, t in lines["best_gguf"].items() if "_exps" in name]
    assert len(experts) == 6 and all(len(c.by_matrix) == 4 and c.tokens == min(c.by_matrix) for c in experts)
    assert all(NOTE in c.note for c in experts if c.tokens < 128)
    sent = calibration.tokens.size * model.config.experts_used  # best_gguf shrinks: held-out tokens make codes too
    assert all(abs(sum(c.by_matrix) - sent) < 8 for c in experts)
