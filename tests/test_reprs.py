"""What prints itself: short in a terminal, a table in a notebook, and never a model's weights."""

import html
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.model import Model
from qjax.pipeline import CalibrationReport, Report, TensorReport

W = jnp.linspace(-1.0, 1.0, 64 * 32).reshape(64, 32)
CONFIG = DecoderConfig(vocab=96, dim=64, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=16)
MODEL = Model(CONFIG, {"a": {"kernel": qjax.quantize(W, "Q4_0", axis=0)}, "norm": {"scale": jnp.ones(64)}})
LOSS = CalibrationReport(0.4, 0.2, 0.5, 0.3, 0.05, 128, 0.1)
REPORT = Report(
    (
        TensorReport("a", (32, 64), "Q4_0", 1152, 0.07, calibration=LOSS),
        TensorReport("b", (32, 192), "Q4_0", 3456, 0.03),
        TensorReport("<n>", (64,), "float32", 256, kept="a vector"),
    ),
    ("1 of 2 <tensors> fell back",),
)
STATS = qjax.Stats(H=jnp.eye(64), h=jnp.ones(64), count=jnp.float32(128))
PLAN = qjax.Plan(tuple(qjax.Rule(f"layers_{i}/a", "Q4_0" if i else "Q8_0") for i in range(200)), "mine")


def cells(page: str) -> list[list[str]]:
    """The rows of a table in HTML."""
    rows = re.findall("<tr>(.*?)</tr>", page)
    return [[html.unescape(cell) for cell in re.findall(">([^<]*)</t[hd]>", row)] for row in rows]


@pytest.mark.parametrize("thing, line", [
    (MODEL, "Model(llama, 2.11 k weights, 2 layers of 64, vocabulary 96, 5.333 bits per weight: "
            "Q4_0 2.05 k, float32 64, no tokenizer)"),
    (REPORT, "Report(3 tensors, 8.26 k weights, 4.86 kB, 4.713 bits per weight: Q4_0 8.19 k, float32 64; "
             "1 of 2 <tensors> fell back)"),
    (STATS, "Stats(H 64 x 64, h 64, 128 tokens)"),
    (PLAN, "Plan('mine', 200 rules: 199 -> Q4_0, 1 -> Q8_0)"),
])  # fmt: skip
def test_one_short_line_and_a_table_for_notebooks(thing, line):
    assert repr(thing) == line
    page = thing._repr_html_()
    assert page.count("<table>") == page.count("</table>") == 1 and "<n>" not in page and "<tensors>" not in page
    assert len(page) < 4000


def test_reprs_survive_trees_of_something_else(without_type_checks):
    """JAX puts shapes, axes and None in place of arrays."""
    shapes = jax.eval_shape(lambda s: s, STATS)
    assert repr(shapes) == "Stats(H 64 x 64, h 64)" and "64 x 64" in shapes._repr_html_()
    assert repr(jax.tree.map(lambda a: None, STATS)) == "Stats()"
    assert repr(jax.tree.map(lambda a: object(), STATS)).startswith("Stats(H <object")
    assert repr(Model(CONFIG, {"a": object()})) == "Model(llama, dict of params)"
    stacked = qjax.Stats(h=jnp.ones((2, 64)), count=jnp.asarray([3.0, 5.0]))
    assert repr(stacked) == "Stats(h 2 x 64, 3 to 5 tokens)" and repr(qjax.Stats()) == "Stats()"
    shapes = jax.eval_shape(lambda q: q, qjax.quantize(W, "Q4_0"))
    assert "<td>" not in shapes._repr_html_() and "64 x 1 x 18" in shapes._repr_html_()
    assert "object" in jax.tree.map(lambda a: object(), shapes)._repr_html_()


def test_a_packed_weight_shows_what_is_stored():
    rotated = qjax.Plan((qjax.Rule("w", "hadamard('in') >> uint2_g64 >> nearest()"),))
    q = qjax.quantize_params({"w": W}, rotated)[0]["w"]
    assert q._repr_html_().startswith(f"<div>{q}</div>")
    assert cells(q._repr_html_())[1:] == [
        ["codes", "uint8", "32 x 1 x 16", "512 B"],
        ["scale", "float16", "32 x 1", "64 B"],
        ["zero", "uint8", "32 x 1", "32 B"],
        ["Rotated/seed", "uint32", "", "4 B"],
    ]
    assert q.nbytes == 512 + 64 + 32 + 4


def test_a_recipe_shows_its_steps():
    page = qjax.recipe("hadamard() >> gptq(bits=3) >> options(damping=0.1)")._repr_html_()
    assert page.startswith("<div>Recipe: needs H</div>")
    assert cells(page)[1:] == [
        ["reparametrize", "hadamard()"],
        ["represent", "uint3_g128"],
        ["round", "nearest(weight='none')"],
        ["round", "ldlq(order='act', grid='static', cross=0.0)"],
        ["damping", "0.1"],
    ]
    named = qjax.recipe("rtn")._repr_html_()
    assert named.startswith("<div>Recipe rtn: needs no statistics</div>") and "as the plan says" in named


def test_a_report_is_printed_by_format():
    shown = str(REPORT).splitlines()
    assert shown[0].split()[:5] == ["format", "tensors", "weights", "size", "bits/weight"]
    assert shown[1].split() == [
        "Q4_0",
        "2",
        "8,192",
        "4.61",
        "kB",
        "4.5",
        "0.04",
        "0.4",
        "->",
        "0.2",
        "0.5",
        "->",
        "0.3",
    ]
    assert shown[3].startswith("all") and "8,256" in shown[3] and shown[4] == REPORT.notes[0]
    assert REPORT.to_dict()["notes"] == [REPORT.notes[0]]


def test_describe_shows_every_leaf():
    plain, compared = (
        qjax.describe(MODEL),
        qjax.describe(MODEL.params, {"a": {"kernel": W}, "norm": {"scale": jnp.ones(64)}}),
    )
    lines = [line.split() for line in repr(compared).splitlines()]
    error = float(jnp.linalg.norm(qjax.dequantize(MODEL.params["a"]["kernel"]) - W) / jnp.linalg.norm(W))
    assert lines[1] == ["a/kernel", "64", "x", "32", "Q4_0", "4.5", f"{error:.5f}"]
    assert lines[2] == ["norm/scale", "64", "float32", "32", "0.00000"]
    assert "error" not in repr(plain) and repr(plain).splitlines()[-1] == compared.title
    assert [r.path for r in plain.leaves] == ["a/kernel", "norm/scale"]
    assert "<table>" in compared._repr_html_() and "a/kernel" in compared._repr_html_()


def test_describe_names_the_leaf_that_is_wrong():
    with pytest.raises(UserError, match="b: describe takes arrays and QTensors, got str"):
        qjax.describe({"a": np.ones(3), "b": "x"})
    with pytest.raises(UserError, match=r"a: expected \(3,\), but in the reference it is missing"):
        qjax.describe({"a": np.ones(3)}, {"b": np.ones(3)})
