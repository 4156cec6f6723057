"""In memory: a params tree in, QTensors and a report out, every mistake named by its leaf."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import qjax
from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.pipeline import quantize_params
from qjax.pipeline.report import Report, TensorReport
from qjax.plan import Plan, Rule

CONFIG = DecoderConfig(vocab=96, dim=64, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=16)
PLAN = Plan((Rule("layers_*/mlp/down/kernel", "keep"), Rule("*/kernel", "Q8_0"), Rule("embed/*", "Q8_0")))


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), jnp.float32), shapes)


def test_every_leaf_is_what_the_plan_says(params):
    q, report = quantize_params(params, PLAN)
    kernel = params["layers_0"]["attn"]["q"]["kernel"]
    got = q["layers_0"]["attn"]["q"]["kernel"]
    assert got.shape == kernel.shape and got.axis == -2
    np.testing.assert_array_equal(qjax.dequantize(got), qjax.dequantize(qjax.quantize(kernel.T, "Q8_0")).T)
    assert q["embed"]["embedding"].axis == -1
    assert q["layers_1"]["mlp"]["down"]["kernel"] is params["layers_1"]["mlp"]["down"]["kernel"]
    assert jax.tree.structure(params) == jax.tree.structure(q, is_leaf=qjax.is_qtensor)
    assert {t.name for t in report.tensors} == {
        jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(params)
    }


def test_report_counts_every_byte_and_error(params):
    q, report = quantize_params(params, PLAN)
    leaves = jax.tree.leaves(q)
    assert report.nbytes == sum(x.nbytes for x in leaves)
    assert report.bits_per_weight == 8 * report.nbytes / sum(x.size for x in jax.tree.leaves(params))
    by_name = {t.name: t for t in report.tensors}
    line = by_name["layers_0/attn/q/kernel"]
    w = np.asarray(params["layers_0"]["attn"]["q"]["kernel"])
    error = np.asarray(qjax.dequantize(q["layers_0"]["attn"]["q"]["kernel"])) - w
    assert line.error == pytest.approx(np.linalg.norm(error) / np.linalg.norm(w), rel=1e-4)
    assert line.bits_per_weight == 8.5 and line.shape == (64, 64)
    assert by_name["final_norm/scale"].kept == "a vector"
    assert by_name["layers_0/mlp/down/kernel"].kept == "kept by rule 'layers_*/mlp/down/kernel'"
    json.dumps(report.to_dict())
    assert list(report.formats) == ["Q8_0", "float32"]


def test_a_printed_report_shows_names_and_obeys_none():
    console = Console(width=160, file=io.StringIO())
    console.print(Report((TensorReport("[red]\x1b[31mw", (2, 32), "Q8_0", 68, 0.1),)).table())
    said = console.file.getvalue()
    assert "[red]\\x1b[31mw" in said and "\x1b" not in said and "0.10000" in said


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_names_the_leaf(params, bad):
    broken = jax.tree.map(lambda x: x, params)
    broken["layers_1"]["attn"]["v"]["kernel"] = params["layers_1"]["attn"]["v"]["kernel"].at[3, 5].set(bad)
    with pytest.raises(UserError, match="layers_1/attn/v/kernel: 1 of its weights are NaN or infinite"):
        quantize_params(broken, PLAN)


def test_other_mistakes_name_the_leaf(params):
    with pytest.raises(UserError, match="layers_0/mlp/up/kernel: importance of shape"):
        quantize_params(params, PLAN, stats={"layers_0/mlp/up/kernel": jnp.ones(3)})
    with pytest.raises(UserError, match="no weight is called 'layer_0'"):
        quantize_params(params, PLAN, stats={"layer_0": jnp.ones(3)})
    q, _ = quantize_params(params, PLAN)
    with pytest.raises(UserError, match="embed/embedding: already quantized to Q8_0"):
        quantize_params(q, PLAN)
    with pytest.raises(UserError, match="too large for Q8_0"):
        quantize_params({"a": {"kernel": jnp.full((32, 2), 1e30)}}, Plan((Rule("*", "Q8_0"),)))


KINDS = [name for name in ("BF16", "Q4_0", "Q4_K", "Q6_K", "TQ2_0", "MXFP4") if name in qjax.format_names()]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", KINDS)
def test_pieces_give_what_quantize_gives(name):
    """Bytes do not depend on how a tensor is cut: ragged pieces against one call of `quantize`."""
    kernel = jnp.asarray(np.random.default_rng(3).standard_t(4, (768, 100)), jnp.float32)
    q, report = quantize_params({"a": {"kernel": kernel}}, Plan((Rule("*", name),)))
    expected = qjax.quantize(kernel, name, axis=0)
    np.testing.assert_array_equal(q["a"]["kernel"].leaves["blocks"], expected.leaves["blocks"])
    error = float(jnp.linalg.norm(qjax.dequantize(expected) - kernel) / jnp.linalg.norm(kernel))
    assert report.tensors[0].error == pytest.approx(error, rel=1e-4)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["Q4_0", "Q5_1"])
def test_importance_reaches_its_columns(name):
    """As good as `quantize` under the weighted error, and better than without importance."""
    rng = np.random.default_rng(3)
    kernel = jnp.asarray(rng.standard_t(4, (768, 100)), jnp.float32)
    weight = jnp.asarray(np.exp(2 * rng.standard_normal(768)), jnp.float32)

    def loss(q):
        return float(jnp.sum(weight[:, None] * (qjax.dequantize(q) - kernel) ** 2))

    q, _ = quantize_params({"a": {"kernel": kernel}}, Plan((Rule("*", name),)), {"a/kernel": weight})
    plain, _ = quantize_params({"a": {"kernel": kernel}}, Plan((Rule("*", name),)))
    expected = loss(qjax.quantize(kernel, name, axis=0, weight=weight))
    assert loss(q["a"]["kernel"]) == pytest.approx(expected, rel=1e-3)
    assert loss(q["a"]["kernel"]) < 0.9 * loss(plain["a"]["kernel"])


def test_formats_that_are_no_ggml_types(params):
    name = "NF4"
    plan = Plan((Rule("layers_0/mlp/down/*", name), Rule("*", "keep")))
    q, report = quantize_params(params, plan)
    kernel = params["layers_0"]["mlp"]["down"]["kernel"]
    expected = qjax.quantize(kernel, name, axis=0)
    jax.tree.map(np.testing.assert_array_equal, q["layers_0"]["mlp"]["down"]["kernel"].leaves, expected.leaves)
    line = next(t for t in report.tensors if t.name == "layers_0/mlp/down/kernel")
    error = float(jnp.linalg.norm(qjax.dequantize(expected) - kernel) / jnp.linalg.norm(kernel))
    assert line.error == pytest.approx(error, rel=1e-4) and line.nbytes == expected.nbytes


def test_all_zeros_have_no_error():
    _, report = quantize_params({"a": {"kernel": jnp.zeros((32, 2))}}, Plan((Rule("*", "Q8_0"),)))
    assert report.tensors[0].error == 0.0


def test_a_record_of_a_format_is_a_plan():
    params = {"up": {"kernel": jnp.ones((64, 8))}}
    record, name = (quantize_params(params, plan)[0]["up"]["kernel"] for plan in (qjax.format("Q4_0"), "Q4_0"))
    assert record.format is name.format
    np.testing.assert_array_equal(record.leaves["blocks"], name.leaves["blocks"])
