"""lm-eval's tasks through our adapter: what its own adapter of the same model in transformers finds."""

import dataclasses
import json

import numpy as np
import pytest

import qjax
from qjax.cli import main
from qjax.errors import UserError
from qjax.evaluate.continuations import continuation_scores
from qjax.models import stdlib_text
from qjax.models.parts import Packed


@pytest.fixture(scope="module")
def model():
    return qjax.load("reference")


def test_scores_are_those_of_the_logits(model):
    """Of several lengths, one beyond the context, in any order."""
    rng = np.random.default_rng(0)
    context = model.config.context
    lengths = [(3, 2), (40, 5), (1, 1), (20, 33), (context, 7)]
    pairs = [tuple(rng.integers(3, model.config.vocab, n).tolist() for n in pair) for pair in lengths]
    pairs[1] = (pairs[1][0], np.argmax(model.logits(np.array([pairs[1][0]])), axis=-1)[0, -1:].tolist())
    found = continuation_scores(model, pairs)
    for (x, y), (score, greedy) in zip(pairs, found, strict=True):
        ids = [*x, *y][-(context + 1) :]
        z = np.asarray(model.logits(np.array([ids[:-1]])), np.float64)[0, -len(y) :]
        logs = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
        assert score == pytest.approx(sum(row[t] for row, t in zip(logs, y, strict=True)), rel=1e-4, abs=1e-4)
        assert greedy == all(row.argmax() == t for row, t in zip(logs, y, strict=True))
    assert found[1][1]


@pytest.mark.slow
def test_our_adapter_finds_what_the_one_of_transformers_does(model, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval")
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    from qjax.evaluate.tasks import adapter, run_tasks

    lines = [line for line in stdlib_text.heldout_text().split("\n") if 30 < len(line) < 70]
    docs = [
        {"text": lines[n], "choices": [lines[n + 1], lines[3 * n + 40], " pass", " = None"], "answer": n % 4,
         "whole": "\n".join(lines[20 * n : 20 * n + 40])}
        for n in range(6)
    ]  # fmt: skip
    (tmp_path / "docs.json").write_text(json.dumps(docs))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.json")}},
        "test_split": "test", "doc_to_text": "{{text}}",
    }  # fmt: skip
    choice = {**common, "task": "choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
              "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}  # fmt: skip
    rolling = {**common, "task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
               "doc_to_target": "{{whole}}", "metric_list": [{"metric": "word_perplexity"}]}  # fmt: skip
    written = {**common, "task": "written", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
               "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12},
               "metric_list": [{"metric": "exact_match"}]}  # fmt: skip
    qjax.save(model, tmp_path / "folder")
    theirs = HFLM(str(tmp_path / "folder"), device="cpu", batch_size=4, dtype="float32")
    options = {"log_samples": True, "bootstrap_iters": 0}
    tasks = [choice, rolling, written]
    a = lm_eval.simple_evaluate(theirs, tasks=tasks, **options)
    b = lm_eval.simple_evaluate(adapter(model), tasks=tasks, **options)
    for name in ("choice", "rolling", "written"):
        for x, y in zip(a["samples"][name], b["samples"][name], strict=True):
            assert x["arguments"] == y["arguments"]
            for s, t in zip(x["resps"], y["resps"], strict=True):
                if name == "written":
                    assert s == t
                else:
                    np.testing.assert_allclose(np.ravel(s)[0], np.ravel(t)[0], atol=2e-3, rtol=1e-5)
    assert sum(bool(x["resps"][0][0]) for x in b["samples"]["written"]) > 2
    numbers = run_tasks(model, [rolling])["rolling"]["word_perplexity"]
    assert numbers == pytest.approx(a["results"]["rolling"]["word_perplexity,none"], rel=1e-3)
    packed = Packed(dataclasses.replace(model, params=qjax.quantize_params(model.params, "Q8_0")[0]))
    assert run_tasks(packed, [rolling])["rolling"]["word_perplexity"] == pytest.approx(numbers, rel=0.02)
    with pytest.raises(UserError, match="unknown task 'chioce'"):
        run_tasks(model, ["chioce"])


def test_tasks_and_texts_are_one_or_the_other(capsys):
    assert main(["eval", "reference"]) == 2
    assert "either --text FILE or --tasks" in capsys.readouterr().err
    assert main(["eval", "reference", "--tasks", "arc_easy", "--baseline", "reference"]) == 2
    assert "tasks are of one model" in capsys.readouterr().err
