"""Every training experiment runs from its config, and what it reports is what it exports."""

import dataclasses
import json
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
import train_tiny
from test_cli_models import make_folder

import qjax
from qjax.cli import main
from qjax.cli.run import load_script
from qjax.config import read
from qjax.errors import UserError
from qjax.training.decoder.arm import Arm
from qjax.training.run.corpus import Corpus

CONFIGS = Path(__file__).parents[2] / "configs" / "training"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    text = folder / "text.txt"
    text.write_text("def main(argv):\n    return [x for x in argv if x]\n" * 200)
    return ["--model", str(make_folder(folder / "model")), "--text", str(text), "--heldout", str(text)]


def extended(name, folder, smoke):
    """A config with a small version of the test's own."""
    path = folder / f"{name}.toml"
    path.write_text(f'extends = "{CONFIGS / name}.toml"\n[smoke]\nsteps = 2\nlog_every = 1\n{smoke}')
    return str(path)


QLORA = """context = 16
batch = 2
eval_windows = 2
entries = [
  { method = "qlora", format = "int4_g32", rank = 4 },
  { method = "qalora", format = "uint4_g32_zf16", rank = 1 },
  { method = "loraqat", format = "int4_g32", rank = 4 },
]
losses.terms = "0.5*ce + 0.5*fkl"
ptq = { "rtn" = "rtn:int4_g32", "4 bits, affine" = "rtn:uint4_g32_zf16" }
[[smoke.arms]]
name = "scales"
grid = { format = "int4_g32", outside = "keep", scales = "learned" }
optimizer.trains = ["scales"]
losses.terms = "0.5*ce + 0.5*fkl"
"""
ARMS = """seeds = [1]
calibration_windows = 4
heldout_windows = 4
base = { vocab = 300, dim = 64, hidden = 128, layers = 1, heads = 2, kv_heads = 1, context = 32, steps = 2, batch = 4 }
ptq = { "2 bits: rtn" = "rtn:int2_g64_mid_mse", "2 bits: gptq" = "gptq:int2_g64_mid_mse" }
block_tuned = { "int2_g64_mid_mse Block-AP" = { how = "adam", steps = 2 } }
[[smoke.arms]]
arm = { name = "continued", optimizer.rate = 5e-3 }
[[smoke.arms]]
teacher = "continued"
group = "2 bits"
[smoke.arms.arm]
name = "2 bits, qat + kd"
grid = { format = "int2_g64_mid_mse", scales = "learned", init = "nearest('h') >> ldlq() >> refit(2, 2)" }
losses.terms = "0.5*ce + 0.5*fkl"
[[smoke.arms]]
arm = { name = "float + kd", losses = { terms = "0.5*ce + 0.5*fkl" } }
teacher = "continued"
ptq = { "2 bits: rtn" = "rtn:int2_g64_mid_mse" }
"""


def run(name, out, *options):
    path = name if name.endswith(".toml") else str(CONFIGS / f"{name}.toml")
    assert main(["run", path, "--smoke", "--out", str(out), *map(str, options)]) == 0
    return json.loads((out / "results.json").read_text())


def test_every_key_of_an_arm_is_set_by_some_config():
    """A key that no config sets is one that nobody runs: it leaves, or a config shows it."""
    keys = set()
    for path in CONFIGS.parent.rglob("*.toml"):
        table = tomllib.loads(path.read_text())
        arms = [c.get("arm", c) for c in table.get("arms", [])]
        for arm in (table.get("arm", {}), *arms):
            keys |= {(part, key) for part, own in arm.items() if part != "name" for key in own}
    parts = {f.name: getattr(Arm("a"), f.name) for f in dataclasses.fields(Arm) if f.name != "name"}
    assert {(part, f.name) for part, record in parts.items() for f in dataclasses.fields(record)} <= keys


class Reached(Exception):
    """Where an experiment would begin to train, as what run."""


class Stub:
    """A program or a state that nothing is computed with."""

    params = constants = {"weights": {}, "adapters": {}}  # noqa: RUF012
    optimizer = None


@pytest.fixture
def identity_of(monkeypatch, tmp_path):
    """(experiment, changes of its config) -> the facts that it asks a resumed run to share; nothing is computed."""
    model, corpus = train_tiny.model(), Corpus(train_tiny.windows().tokens, train_tiny.heldout())

    def trains(program, state, data, run):
        raise Reached(run.identity)

    def identity_of(name, cached=None, **changes):
        script, _ = load_script(read(CONFIGS.parent / f"{name}.toml"))
        config = dataclasses.replace(script.Config(steps=200, batch=4, context=8), **changes)
        stubs = {
            "load": lambda *_: model, "load_float": lambda *_: model, "fresh_model": lambda *_: model,
            "texts_of": lambda *_: ([], ""),
            "tokenizer_in": lambda *_: type("Tokenizer", (), {"get_vocab_size": lambda self: 64})(),
            "corpus_for": lambda *_: corpus, "corpus_in": lambda *_: corpus,
            "heldout_loss": lambda *_: 0.0, "mean_loss": lambda *_: 0.0, "cache_teacher": lambda *_: None,
            "read_top_k": lambda _: {"indices": np.zeros(cached or (config.steps * config.batch, config.context, 64))},
            "calibration_of": lambda *_, **__: None, "quantize_model": lambda *_: (model, None),
            "program": lambda *_, **__: Stub(), "start_state": lambda *_, **__: None,
            "init_state": lambda *_: Stub(), "finetune": trains,
        }  # fmt: skip
        for stub, value in stubs.items():
            monkeypatch.setattr(script, stub, value, raising=False)
        with pytest.raises(Reached) as reached:
            script.run(config, tmp_path)
        return reached.value.args[0]

    return identity_of


@pytest.mark.parametrize("name", ["training/qat", "training/distill", "training/qlora", "pretrain_reference"])
def test_another_batch_or_context_is_another_run(identity_of, name):
    first = identity_of(name)
    assert {"batch": 4, "context": 8, "data": "walk"}.items() <= first.items()
    assert identity_of(name, batch=8) == {**first, "batch": 8}
    assert identity_of(name, context=16) == {**first, "context": 16}


def test_a_cached_teacher_of_another_context_is_refused(identity_of):
    with pytest.raises(UserError, match=r"teacher holds 800 sequences of 9 tokens .* wants 800 of 8"):
        identity_of("training/distill", cached=(800, 9, 64))


@pytest.mark.slow
def test_qat(tiny, tmp_path, capsys):
    options = [*tiny, "--arm.grid.format", "Q4_0", "--arm.grid.init", "gptq", "--export", "gguf"]
    results = run("qat", tmp_path / "run", *options)
    assert set(results["losses"]) == {"float", "gptq", "trained"} and results["rows"][-1]["step"] == 2
    assert {row["of"] for row in results["grid"]} == {row["of"] for row in results["weights"]}
    assert results["weights"][0]["of"].endswith("mlp/up/kernel in Q4_0")
    model = qjax.load(tmp_path / "run" / "model.gguf")
    leaves = jax.tree.leaves(model.params, is_leaf=qjax.is_qtensor)
    assert any(qjax.is_qtensor(leaf) and leaf.format.name == "Q4_0" for leaf in leaves)
    assert "bits per quantized weight" in capsys.readouterr().out
    assert run("qat", tmp_path / "run", *options)["losses"] == results["losses"]  # nothing was left to do


def test_formats_that_the_file_lacks_are_refused_before_any_work(tiny, tmp_path, capsys):
    options = [*tiny, "--arm.grid.format", "int3_g32", "--export", "gguf", "--out", str(tmp_path)]
    assert main(["run", str(CONFIGS / "qat.toml"), "--smoke", *options]) == 2
    assert "GGUF has no type int3_g32" in capsys.readouterr().err
    assert not (tmp_path / "tokens.bin").exists()


def test_an_unknown_key_of_an_arms_record_is_refused(tmp_path, capsys):
    path = tmp_path / "wrong.toml"
    path.write_text(f'extends = "{CONFIGS / "qat.toml"}"\n[arm]\ngrid.formt = "Q4_0"\n')
    assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "wrong.toml:arm.grid.formt: unknown key; did you mean format?" in capsys.readouterr().err


@pytest.mark.slow
def test_distill(tiny, tmp_path):
    results = run("distill", tmp_path, "--teacher", *tiny[1:], "--arm.grid.format", "int3_g32")
    assert results["rows"][-1]["fkl"] > 0 and (tmp_path / "teacher").is_dir()


def test_shares_are_compared_with_the_control_that_its_best_recipe_rounds():
    script, _ = load_script(read(CONFIGS / "share.toml"))
    losses = {"share 0": (4.0, 4.2), "share 0.2": (3.5, 3.6), "float as 0.2: rtn": (3.9, 3.5),
              "float as 0.2: gptq": (3.6, 3.7), "float as 0.4: rtn": (1.0, 1.0)}  # fmt: skip
    runs = [
        {"seed": seed, "name": name, "share": 0.2, "fused": True, "loss": loss}
        for name, each in losses.items()
        for seed, loss in enumerate(each)
    ]
    rows = {r["name"]: r for r in script.summary(runs, script.Config(controls=(0.2, 0.4)))}
    assert rows["share 0.2"]["difference"] == pytest.approx(-0.55)
    assert rows["share 0.2"]["over_control"] == pytest.approx(-0.1)  # gptq's: the lowest mean, of the first control
    assert rows["float as 0.2: rtn"]["over_control"] == pytest.approx(0.05)
    for wrong, said in (({"controls": (1.0,)}, "between 0 and 1"), ({"roundings": ("rtn:Q4_0",)}, "names a format")):
        with pytest.raises(UserError, match=said):
            script.check(script.Config(**wrong))


@pytest.mark.slow
def test_qlora(tiny, tmp_path):
    """Methods that the config's own small version leaves out, too."""
    results = run(extended("qlora", tmp_path, QLORA), tmp_path / "out", *tiny)
    by = {r["method"]: r for r in results["runs"]}
    assert by["qlora"]["semantics"] == "requantized" and by["loraqat"]["semantics"] == "fake-quantized"
    assert by["loraqat"]["merged"] == pytest.approx(by["loraqat"]["adapted"], rel=1e-5)
    ptq = {r["label"]: r["merged"] for r in results["runs"] if r["method"] == "ptq"}
    assert ptq["rtn"] == pytest.approx(by["qat"]["base"], rel=1e-6)  # the arm began where rounding ends
    gains = {r["name"]: r.get("gain_over_ptq") for r in results["rows"]}
    assert gains["scales"] == pytest.approx(ptq["rtn"] - by["qat"]["merged"])
    assert gains["qalora uint4_g32_zf16"] == pytest.approx(ptq["4 bits, affine"] - by["qalora"]["merged"])
    assert gains["rtn"] is None
    again = run(extended("qlora", tmp_path, QLORA), tmp_path / "out", *tiny)
    assert again["runs"] == results["runs"] and len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 6
    wrong = extended("qlora", tmp_path, QLORA.replace("rtn:int4_g32", "rtn:int4_g48"))
    assert main(["run", wrong, "--smoke", "--out", str(tmp_path / "wrong"), *tiny]) == 2
    assert len(results["curve"]) == 2 * len({row["arm"] for row in results["curve"]}) == 2 * (len(by) - 1)


@pytest.mark.slow
def test_arms(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, models = tmp_path / "out", tmp_path / "models"
    options = ["--models", models, *tiny[2:]]
    config = extended("qat_vs_ptq", tmp_path, ARMS)
    results = run(config, out, *options)
    assert "closed, %" in capsys.readouterr().out and (models / "seed1" / "model").is_dir()
    names = [row["name"] for row in results["rows"]]
    assert names[:2] == ["start", "continued"] and "2 bits, qat + kd" in names and "ptq 2 bits: gptq" in names
    row = results["rows"][names.index("2 bits, qat + kd")]
    student = results["rows"][names.index("float + kd, rounded: 2 bits, rtn")]
    assert student["group"] == "2 bits" and student["closed_percent"] is not None
    control = results["rows"][names.index("ptq 2 bits: rtn")]
    assert "closed_percent" not in control and student["loss"] != control["loss"]
    assert row["quant_noise"] > 0.1 and row["closed_percent"] is not None and row["half_interval"] is None
    curve = {(row["arm"], row["step"]): row for row in results["curve"]}
    assert set(curve) == {(name, step) for name in ("continued", "2 bits, qat + kd", "float + kd") for step in (1, 2)}
    assert curve["2 bits, qat + kd", 2]["heldout"] == row["loss"] and curve["2 bits, qat + kd", 2]["scale_drift"] > 0

    assert run(config, out, *options)["rows"] == results["rows"]  # nothing was left to do
    other = ["run", config, "--smoke", *map(str, options), "--base.layers", "3"]
    assert main(other) == 2
    assert "holds other float models" in capsys.readouterr().err
