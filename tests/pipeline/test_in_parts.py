"""A model judged and continued from its file, a part at a time: the numbers of the model in memory."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
from test_pipeline import write_model
from tiny_walks import CONFIG, plan_of, tiny_calibration

import qjax
from qjax.evaluate import network
from qjax.evaluate.judge import baseline_of, judge
from qjax.evaluate.sizes import sizes
from qjax.models import parts
from qjax.models.generate import generate
from qjax.pipeline import quantize_file
from qjax.pipeline.source import Source, open_source

TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab, 96)


def lively(tensors):
    for name in tensors:
        if tensors[name].ndim == 2:
            tensors[name] *= 20 if name == "token_embd.weight" else 3


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def files(request, tmp_path_factory):
    """The float model's file, and that of its packed form."""
    folder = tmp_path_factory.mktemp("model")
    floats = write_model(folder / "m.gguf", dataclasses.replace(CONFIG, tied=request.param), edit=lively)
    quantize_file(floats, folder / "q.gguf", "Q4_0")
    return floats, folder / "q.gguf"


def test_judged_from_files_a_part_at_a_time(files, monkeypatch):
    """KL too, with the vocabulary in three chunks; every block is asked for once, and gone before the next one."""
    models = [qjax.load(path) for path in files]
    expected = judge(models[1], baseline=baseline_of(models[0], TOKENS, context=16)).to_json()
    asked, blocks, part = [], [], Source.part

    def spy(self, name):
        gc.collect()
        assert not [ref for ref in blocks if ref() is not None]
        tree = part(self, name)
        asked.append((self.path, name))
        if name.startswith("layers_"):
            blocks.append(weakref.ref(tree["mlp"]["up"]["kernel"]))
        return tree

    monkeypatch.setattr(Source, "part", spy)
    monkeypatch.setattr(parts, "HEAD_WEIGHTS", 24 * CONFIG.dim)
    monkeypatch.setattr(network, "HEAD_ELEMENTS", 24 * 5)
    floats, packed = map(open_source, files)
    found = judge(packed, TOKENS, baseline=floats, context=16).to_json()
    for key in ("perplexity", "kl_mean", "kl_p99", "kl_max", "base_perplexity", "rms_dp_percent", "same_top_percent"):
        assert found[key] == pytest.approx(expected[key], rel=2e-4), key
    names = ["layers_0", "layers_1", "final_norm"]
    assert sorted(asked) == sorted((s.path, name) for s in (floats, packed) for name in names)


def test_continued_from_a_file(files):
    for path in files:
        model, opened = qjax.load(path), open_source(path)
        assert list(generate(opened, [3, 1, 4], 8)) == list(generate(model, [3, 1, 4], 8))
        assert opened.stops == model.stops and vars(opened.card) == vars(model.card)


def test_a_file_s_sizes_are_those_of_its_leaves(files):
    for path in files:
        assert open_source(path).sizes == sizes(qjax.load(path, dtype=None).params)


def test_rows_are_read_alone(files):
    for path in files:
        source = open_source(path)
        tensor = next(t for t in source.tensors if t.name == "token_embd.weight")
        which = np.array([5, 3, 3, 60])
        np.testing.assert_array_equal(tensor.rows(which), tensor.read().astype(np.float32)[which])


@pytest.mark.parametrize("recipe, reads", [("nearest('h')", 1), ("nearest('h') >> options(sensitive=True)", 3)])
def test_what_a_walk_reads(files, recipe, reads, tmp_path, monkeypatch):
    """Each part once, and with a survey once more each way; of the embedding the survey reads the rows of the text."""
    asked, part = [], Source.part
    monkeypatch.setattr(Source, "part", lambda self, name: asked.append(name) or part(self, name))
    plan = plan_of(("*", "Q4_0"))
    quantize_file(files[0], tmp_path / "q.gguf", plan, recipe=recipe, calibration=tiny_calibration(windows=3))
    tied = "head" not in open_source(files[0])._names
    assert {asked.count(name) for name in ("layers_0", "layers_1")} == {reads}
    assert asked.count("embed") == (2 if tied and reads == 3 else 1)
    assert asked.count("head") == (0 if tied else 2 if reads == 3 else 1)
