"""A walk that tunes its blocks: from file to file, stopped and continued to the byte."""

import dataclasses

import pytest
from test_pipeline import write_model
from tiny_walks import CONFIG, plan_of, tiny_calibration

from qjax.errors import UserError
from qjax.pipeline import quantize_file
from qjax.training.tuning.blocks import TuneBlocks
from qjax.training.tuning.descent import Tuning

CALIBRATION = tiny_calibration()
PLAN = plan_of(("layers_0/mlp/up/kernel", "keep"), ("*", "Q4_0"))
TUNER = TuneBlocks(Tuning(steps=4, batch=2, rate=1e-2, looks=2))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", CONFIG)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """(bytes, report) of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "q.gguf"
    report = run(model, out)
    return out.read_bytes(), report


def run(model, out, tune=TUNER, recipe="gptq", **options):
    return quantize_file(model, out, PLAN, recipe=recipe, calibration=CALIBRATION, tune=tune, **options)


def interrupt(model, out, behind):
    """Ctrl-C after the weight `behind`."""

    def walked(step):
        if step.path == behind:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, out, walked=walked)


@pytest.mark.slow
@pytest.mark.parametrize("behind", ["layers_0/mlp/down/kernel", "layers_1/attn/o/kernel", "head/kernel"])
def test_it_is_continued_to_the_byte(model, whole, tmp_path, behind):
    raw, report = whole
    interrupt(model, tmp_path / "q.gguf", behind)
    again = run(model, tmp_path / "q.gguf")
    assert (tmp_path / "q.gguf").read_bytes() == raw
    notes = [[t.calibration.note for t in r.tensors if t.calibration] for r in (report, again)]
    assert notes[0] == notes[1] and sum("tuned on its output" in note for note in notes[0]) == 13


@pytest.mark.slow
def test_another_tuning_starts_over(model, whole, tmp_path):
    interrupt(model, tmp_path / "q.gguf", "head/kernel")
    messages, other = [], TuneBlocks(dataclasses.replace(TUNER.tuning, rate=2e-2))
    run(model, tmp_path / "q.gguf", tune=other, notify=messages.append)
    assert any("starting over" in m for m in messages) and (tmp_path / "q.gguf").read_bytes() != whole[0]


def test_a_plain_recipe_has_no_block_to_tune(model, tmp_path):
    with pytest.raises(UserError, match="rtn rounds no block behind its input"):
        run(model, tmp_path / "q.gguf", recipe="rtn")
