"""Bad texts, bad statistics, bad options: one clear line that names what is wrong, or a reported, safe result."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli_models import TEXT, folder, make_folder, mistake, text  # noqa: F401  (fixtures)
from tiny_walks import CONFIG, dense, get, plan_of, put, tiny_calibration, tiny_model

import qjax
from qjax.calibrate import imatrix_of
from qjax.cli import main
from qjax.errors import UserError
from qjax.io.imatrix import write_imatrix
from qjax.io.text import texts_at
from qjax.models.config import DecoderConfig
from qjax.models.families import weight_names
from qjax.pipeline import Calibration, calibration_of, calibration_text, quantize_file, quantize_model, quantize_params
from qjax.pipeline.calibrated import survey_model
from qjax.pipeline.windows import in_turn
from qjax.stats import Stats

PLAN = plan_of(("*", "Q4_0"))
CHEAP = "nearest('h') >> ldlq('act') >> options(sequential=False)"  # looks at H; one program for all weights
ONE = plan_of(("layers_1/attn/o/kernel", "Q4_0"), ("*", "keep"))


# --- texts ------------------------------------------------------------------------------------------------------------

IDS = np.arange(100)
TEXTS = {
    "shorter than a window": ({"tokens": IDS, "context": 101, "heldout": 0.0}, "has 100 tokens; 1 windows of 101"),
    "one window, one held out": ({"tokens": IDS, "context": 60}, "has 100 tokens; 2 windows of 60"),
    "nothing": ({"tokens": [], "context": 16}, "has 0 tokens; 2 windows of 16"),
    "all held out": ({"tokens": IDS, "context": 16, "heldout": 1.0}, "heldout is a share .* got 1.0"),
    "less than none held out": ({"tokens": IDS, "context": 16, "heldout": -0.1}, "heldout is a share"),
    "too much held out": ({"tokens": IDS, "context": 25, "heldout": 0.99}, "has 100 tokens; 2 windows"),
    "longer than the model's": (
        {"tokens": IDS, "context": 300},
        "300 tokens .* longer than the model's context of 256",
    ),
    "a limit of one window": (
        {"tokens": IDS, "context": 16, "limit": 1},
        "a limit of 1 calibration windows is too low: 2 are the least",
    ),
    "no limit at all": ({"tokens": IDS, "context": 16, "limit": 0}, "a limit of 0 calibration windows is too low"),
    "empty windows": ({"tokens": IDS, "context": 0}, "context"),
    "negative windows": ({"tokens": IDS, "context": -5}, "context"),
    "an empty batch": ({"tokens": IDS, "context": 16, "batch": -1}, "batch"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_bad_texts(case):
    options, message = TEXTS[case]
    with pytest.raises(UserError, match=message):
        calibration_of(256, options.pop("tokens"), **options)


def test_windows_of_a_good_text():
    c = calibration_of(256, IDS, context=16, limit=5, heldout=0.25, bos=7)
    assert c.tokens.shape == (5, 16) and c.heldout == 1 and c.used == 4
    assert (c.tokens[:, 0] == 7).all() and (c.tokens[1, 1:] == IDS[17:32]).all() and (np.arange(100) == IDS).all()
    assert [(s.start, s.stop) for s in calibration_of(256, IDS, context=16, heldout=0.5, batch=2).steps] == [
        (0, 2), (2, 3), (3, 5), (5, 6)
    ]  # fmt: skip


def test_of_several_texts_windows_are_taken_in_turn(tmp_path):
    a, b, c = list(range(9)), list(range(100, 105)), [200]
    assert in_turn([a, b, c], 2).tolist() == [0, 1, 100, 101, 2, 3, 102, 103, 4, 5, 6, 7, 8, 104, 200]
    assert in_turn([c, c], 2).tolist() == [200, 200]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("two")
    (tmp_path / "a.json").write_text('["one", "more"]')
    (tmp_path / "picture.png").write_bytes(b"\xff")
    (tmp_path / "last.txt").write_text("three")
    assert texts_at([tmp_path, tmp_path / "last.txt"]) == ["one", "more", "two", "three", "three"]


def test_a_quarter_is_held_out_where_a_recipe_shrinks():
    for windows, held, expected in ((8, 1, 2), (8, 4, 4), (8, 0, 2), (2, 0, 1), (1, 0, 0), (64, 8, 16)):
        made = Calibration(np.zeros((windows, 4), np.int32), held)
        assert made.to_shrink().heldout == expected, (windows, held)


def test_no_tokenizer():
    with pytest.raises(UserError, match=r"no tokenizer .* give token ids"):
        calibration_text(tiny_model(), "a text")


@pytest.mark.parametrize("bad", [-1, CONFIG.vocab])
def test_a_token_outside_the_vocabulary(bad):
    c = tiny_calibration()
    tokens = c.tokens.copy()
    tokens[5, 3] = bad
    with pytest.raises(UserError, match=f"token {bad} is outside the model's vocabulary of 64"):
        quantize_model(tiny_model(), PLAN, "gptq", Calibration(tokens, 2))


def test_windows_longer_than_the_context():
    with pytest.raises(UserError, match="65 tokens are more than the model's context of 64"):
        quantize_model(tiny_model(), PLAN, "gptq", Calibration(np.zeros((2, 65), np.int32), 0))


@pytest.mark.slow
@pytest.mark.parametrize("context", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_hardly_a_token_is_said_and_gives_finite_weights(context):
    """One token is an H of rank one: rounded all the same, and reported."""
    model, c = tiny_model(), Calibration(np.asarray([[5, 9, 11][:context]], np.int32))
    out, report = quantize_model(model, PLAN, "nearest('h') >> ldlq('act') >> descend(1)", c)
    for t in report.tensors:
        if not t.kept:
            assert np.isfinite(np.asarray(dense(get(out.params, t.name)))).all(), t.name
            assert t.error < 0.5 and t.calibration.loss <= t.calibration.first_loss
            assert t.calibration.heldout_loss is None and t.calibration.damping >= 0.05
            assert t.calibration.note == f"saw {context} tokens, fewer than its 64 inputs"
    assert np.isfinite(np.asarray(out.logits(c.tokens))).all()


# --- broken weights ---------------------------------------------------------------------------------------------------


def broken(path, value):
    model = tiny_model()
    leaf = get(model.params, path)
    at = (3,) * leaf.ndim
    return qjax.models.model.Model(model.config, put(model.params, path, leaf.at[at].set(value)))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", ["rtn", "imatrix", "best_gguf"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("path", [
    "layers_0/attn_norm/scale", "final_norm/scale", "layers_0/mlp/up/kernel", "embed/embedding", "head/kernel"
])  # fmt: skip
def test_a_broken_weight_is_named(path, recipe, value):
    """A kept one too, and by curvature's recipes, which would find it everywhere."""
    plan = plan_of(("embed/*", "rtn:Q4_0"), ("*", "Q4_0"))
    with pytest.raises(UserError, match=f"^{path}: 1 of its weights are NaN or infinite"):
        quantize_model(broken(path, value), plan, recipe, tiny_calibration())


def test_a_broken_weight_is_named_before_a_walk_has_come_to_it():
    """From a file parts are read one by one: each is looked at before anything is computed with it."""
    model = broken("layers_1/mlp_norm/scale", jnp.nan)
    with pytest.raises(UserError, match=r"^layers_1/mlp_norm/scale: 1 of its weights"):
        survey_model(model, tiny_calibration())


def test_a_broken_kept_leaf_of_any_tree_is_named():
    params = {"norm": {"scale": jnp.ones(8).at[3].set(jnp.nan)}, "w": {"kernel": jnp.ones((32, 8))}, "n": jnp.arange(3)}
    with pytest.raises(UserError, match=r"^norm/scale: 1 of its weights are NaN or infinite"):
        quantize_params(params, plan_of(("w/kernel", "Q4_0"), ("*", "keep")))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("path, named", [
    ("layers_0/attn_norm/scale", "layers_0/attn/q/kernel: its input has NaN or Inf"),
    ("layers_1/mlp_norm/scale", "layers_1/mlp/gate/kernel: its input has NaN or Inf"),
])  # fmt: skip
def test_activations_that_overflow_name_a_weight(path, named):
    with pytest.raises(UserError, match=named):
        quantize_model(broken(path, 3e38), PLAN, "imatrix", tiny_calibration())


def test_a_model_of_zeros_is_no_fault_of_the_text():
    model = tiny_model()
    model = dataclasses.replace(model, params=jax.tree.map(jnp.zeros_like, model.params))
    with pytest.raises(UserError, match=r"layers_0/attn/q/kernel: its input is zero at every token; the model's"):
        quantize_model(model, PLAN, "imatrix", tiny_calibration())


def test_a_weight_that_is_packed_already():
    model = tiny_model()
    path = "layers_0/attn/q/kernel"
    packed = qjax.quantize(get(model.params, path), "Q8_0", axis=0)
    model = qjax.models.model.Model(model.config, put(model.params, path, packed))
    with pytest.raises(UserError, match=f"{path}: already quantized to Q8_0; start from the float model"):
        quantize_model(model, PLAN, "gptq", tiny_calibration())


# --- statistics -------------------------------------------------------------------------------------------------------

W = {"w": {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.float32)}}
GOOD = Stats(H=jnp.eye(64), h=jnp.ones(64), count=jnp.float32(100))
INDEFINITE = jnp.eye(64).at[0, 1].set(100.0).at[1, 0].set(100.0)
STATS = {
    "indefinite H": (
        "gptq",
        Stats(H=INDEFINITE, count=jnp.float32(100)),
        "w/kernel.* H = .* not positive semi-definite",
    ),
    "negative H": ("gptq", Stats(H=-jnp.eye(64), count=jnp.float32(100)), "w/kernel.* not positive semi-definite"),
    "H of another width": ("gptq", Stats(H=jnp.eye(32)), "w/kernel.* 'H' is of 32 inputs, the weight has 64"),
    "h of another width": ("imatrix", Stats(h=jnp.ones(8)), "w/kernel: importance of shape"),
    "no H": ("gptq", Stats(h=jnp.ones(64)), "w/kernel.* needs the statistic 'H'"),
    "no cross": ("gptaq", Stats(H=jnp.eye(64)), "w/kernel.* needs the statistic 'cross'"),
    "no h": ("imatrix", None, "w/kernel.* needs the statistic 'h'"),
    "nothing": ("gptq", None, "w/kernel.* needs the statistic 'H'"),
    "NaN": ("gptq", Stats(H=jnp.eye(64).at[3, 4].set(jnp.nan)), "w/kernel: its input has NaN or Inf"),
    "no token": (
        "gptq",
        Stats(H=jnp.zeros((64, 64)), count=jnp.float32(0)),
        "w/kernel: no calibration token reached it",
    ),
}


@pytest.mark.parametrize("case", STATS)
def test_bad_statistics_name_the_weight(case):
    recipe, stats, message = STATS[case]
    with pytest.raises(UserError, match=message):
        quantize_params(W, PLAN, None if stats is None else {"w/kernel": stats}, recipe=recipe)


def test_statistics_of_no_weight():
    with pytest.raises(UserError, match="stats: no weight is called 'v/kernel'; they are called like 'w/kernel'"):
        quantize_params(W, PLAN, {"v/kernel": GOOD}, recipe="gptq")
    with pytest.raises(UserError, match="axes: no weight is called 'v'"):
        quantize_params(W, PLAN, {"w/kernel": GOOD}, recipe="gptq", axes={"v": -1})


POOR = {
    "all dead": jnp.zeros((64, 64)),
    "dead columns": jnp.eye(64).at[:9].set(0.0),
    "rank one": jnp.ones((64, 64)),
    "tiny": 1e-30 * jnp.eye(64),
}


@pytest.mark.parametrize("H", POOR)
def test_poor_statistics_give_finite_codes(H):
    H = POOR[H]
    q, report = quantize_params(W, PLAN, {"w/kernel": Stats(H=H, count=jnp.float32(100))}, recipe="gptq")
    assert np.isfinite(np.asarray(qjax.dequantize(q["w"]["kernel"]))).all()
    line = report.tensors[0].calibration
    assert report.tensors[0].error < 0.5 and 0.05 <= line.damping <= 1.6 and np.isfinite(line.damping)


# --- from file to file, and the command line --------------------------------------------------------------------------


def test_a_file_needs_a_calibration(folder, tmp_path):  # noqa: F811
    out = tmp_path / "q.gguf"
    with pytest.raises(UserError, match=r"recipe gptq needs H of its input: give a calibration text"):
        quantize_file(folder, out, "Q4_0", recipe="gptq")
    with pytest.raises(UserError, match=r"blk.0.attn_k.weight: recipe imatrix needs h"):
        quantize_file(folder, out, plan_of(("blk.0.attn_k.weight", "imatrix:Q4_0"), ("*", "Q8_0")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_broken_model_leaves_nothing(folder, tmp_path):  # noqa: F811
    """A NaN that is found in the middle of a walk takes the partial file and its state with it."""
    model = qjax.load(folder)
    kernel = model.params["layers_1"]["mlp"]["down"]["kernel"]
    model.params["layers_1"]["mlp"]["down"]["kernel"] = kernel.at[3, 5].set(jnp.nan)
    qjax.save(model, tmp_path / "bad")
    (tmp_path / "bad" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    c = calibration_text(qjax.load(folder), TEXT, context=16, limit=4)
    with pytest.raises(UserError, match="layers_1/mlp/down/kernel: 1 of its weights are NaN"):
        quantize_file(tmp_path / "bad", tmp_path / "q.gguf", "Q4_0", recipe="imatrix", calibration=c)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def command_lines(folder, text, tmp_path):  # noqa: F811
    quantize = ["quantize", folder, "-o", tmp_path / "q.gguf", "--type", "Q4_0"]
    other = tmp_path / "other.imatrix"
    config = DecoderConfig(vocab=96, dim=32, hidden=64, layers=1, heads=2, kv_heads=2, head_dim=16)
    names = weight_names(config)
    stats = {
        "/".join(w.path): Stats(h=jnp.ones(32), count=jnp.float32(8)) for w in names if w.gguf == "blk.0.attn_q.weight"
    }
    write_imatrix(other, imatrix_of(stats, names))
    short = tmp_path / "short.txt"
    short.write_text("def main")
    plan = tmp_path / "plan.toml"
    plan.write_text('[rules]\n"*" = "gptq:Q4_0"\n')
    return {
        "a text for rtn": ([*quantize, "--calib", text], "recipe 'rtn' takes no calibration text"),
        "an imatrix for gptq": (
            [*quantize, "--recipe", "gptq", "--imatrix", other, "--calib", text],
            "--imatrix holds less",
        ),
        "an imatrix for gptq alone": ([*quantize, "--recipe", "gptq", "--imatrix", other], "--calib TEXT"),
        "an imatrix of another model": ([*quantize, "--recipe", "imatrix", "--imatrix", other], "blk.0.attn_q.weight"),
        "an imatrix that is none": ([*quantize, "--recipe", "imatrix", "--imatrix", text], str(text)),
        "no such recipe": ([*quantize, "--recipe", "best_guff"], "did you mean best_gguf?"),
        "a format in the recipe": ([*quantize, "--recipe", "gptq:Q4_0"], "the format comes from --type or --plan"),
        "no such text": ([*quantize, "--recipe", "gptq", "--calib", tmp_path / "gone.txt"], "gone.txt"),
        "a short text": ([*quantize, "--recipe", "gptq", "--calib", short], "the calibration text has"),
        "long windows": ([*quantize, "--recipe", "gptq", "--calib", text, "--calib-ctx", 65], "context of 64"),
        "no windows": ([*quantize, "--recipe", "gptq", "--calib", text, "--calib-windows", 0], "windows"),
        "empty windows": ([*quantize, "--recipe", "gptq", "--calib", text, "--calib-ctx", 0], "context"),
        "a plan with recipes and no text": ([*quantize[:-2], "--plan", plan], "give a calibration text"),
        "a stage that is none": (
            [*quantize, "--recipe", "nearest() >> ldlk()", "--calib", text],
            "unknown stage 'ldlk'",
        ),
    }


def test_command_lines(folder, text, tmp_path, mistake):  # noqa: F811
    for case, (argv, message) in command_lines(folder, text, tmp_path).items():
        said = mistake(*argv)
        assert message in said, f"{case}: {said}"
        assert not list(tmp_path.glob("q.gguf*")), case


@pytest.mark.slow
def test_an_imatrix_file_is_as_good_as_the_text_it_came_from(folder, text, tmp_path, capsys):  # noqa: F811
    """h of the float model through llama.cpp's file, and through a walk."""
    model = qjax.load(folder)
    c = calibration_text(model, TEXT, context=32, limit=8, heldout=0.0)

    def apply(params, tokens):
        return qjax.models.decoder.Decoder(model.config).apply({"params": params}, tokens)

    stats = qjax.observe(apply, model.params, [jnp.asarray(c.tokens)], kinds=("h",))
    stats = {path: s for path, s in stats.items() if path != "embed/embedding"}
    write_imatrix(tmp_path / "im.gguf", imatrix_of(stats, weight_names(model.config), ("TEXT",), 32))
    argv = ["quantize", str(folder), "-o", str(tmp_path / "a.gguf"), "--type", "pure:Q4_0", "--recipe", "imatrix"]
    assert main([*argv, "--imatrix", str(tmp_path / "im.gguf"), "--json", "-"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["recipe"] == "imatrix" and made["formats"]["Q4_0"] > 0
    from_text, _ = quantize_model(model, PLAN, "imatrix", c)
    a = qjax.load(tmp_path / "a.gguf").dense
    same = [
        np.isclose(x, y, rtol=1e-6).mean()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(from_text.dense), strict=True)
    ]
    assert min(same) > 0.98
