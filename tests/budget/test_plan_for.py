"""A budget on a small decoder: costs are the judge's own KL, the plan keeps its bytes and loses to none of its size."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.budget import TARGETS, groups_of, plan_for, search
from qjax.budget.forward import Runs
from qjax.budget.groups import stored_size
from qjax.budget.rounding import Rounder
from qjax.budget.sensitivity import interpolated
from qjax.budget.told import rows_of
from qjax.errors import UserError
from qjax.evaluate.divergence import divergence, make_baseline
from qjax.evaluate.judge import network_of_decoder
from qjax.evaluate.perplexity import Windows
from qjax.formats import format as get_format
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.model import Model
from qjax.pipeline import quantize_params
from qjax.plan import Plan, Rule, decoder_weights
from qjax.recipes import recipe
from qjax.tensor import is_qtensor

CONFIG = DecoderConfig(vocab=96, dim=64, hidden=128, layers=2, heads=2, kv_heads=1, head_dim=32, context=32)
FORMATS = ("Q4_0", "Q5_0", "Q8_0")


@pytest.fixture(scope="module")
def model():
    params = Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return Model(CONFIG, jax.tree.map(lambda p: 2 * p if p.ndim > 1 else p, params))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 96, size=(4, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def found(model, tokens):
    return plan_for(model, tokens, bits=6.2, formats=FORMATS, measured=3)


def rounded(model, formats):
    """Another way to the same model."""
    rules = [Rule(path, f) for path, f in formats.items()]
    return quantize_params(model.params, Plan((*rules, Rule("*", "keep"))))[0]


def test_a_cost_is_the_kl_of_the_model_with_that_group_alone_rounded(model, tokens):
    groups = groups_of(decoder_weights(CONFIG), TARGETS["llama.cpp"], FORMATS)
    windows = Windows(tokens, 4, "budget")
    params = {name: model.part(name) for name in model.params}
    rounder = Rounder(Runs(CONFIG, windows, params).with_baseline(), recipe("rtn"))
    room = sum(math.prod(w.shape) for g in groups for w in g.weights)
    (*_, last) = search(rounder, rounder.runs, groups, room, {}, measured=3, mend=False).sensitivities
    network = network_of_decoder(CONFIG)
    baseline = make_baseline(network, model, windows)
    for choice in last.choices:
        alone = Model(CONFIG, rounded(model, {w.path: choice.format for w in last.group.weights}))
        _, distance = divergence(network, alone, baseline)
        assert choice.cost == pytest.approx(distance.kl_mean, rel=1e-3)


def test_the_plan_has_its_bytes_and_nothing_of_its_size_is_better(model, tokens, found):
    plan, seen = found
    qparams, report = quantize_params(model.params, Plan.from_dict(plan.to_dict()))
    weights = sum(math.prod(w.shape) for w in decoder_weights(CONFIG))
    assert 0.97 * 6.2 < 8 * report.nbytes / weights <= 6.2
    assert {leaf.format.name for leaf in jax.tree.leaves(qparams, is_leaf=is_qtensor) if is_qtensor(leaf)} > {"Q8_0"}
    uniform = [c for c in seen.candidates if c.name in FORMATS]
    assert [c.name for c in uniform] == ["Q5_0", "Q4_0"]
    assert seen.best.kl == min(c.kl for c in seen.candidates) < uniform[0].kl
    budget = seen.candidates[0]
    assert budget.predicted == pytest.approx(budget.kl, rel=0.4)


def test_a_better_rival_is_what_is_returned(model, tokens):
    groups = groups_of(decoder_weights(CONFIG), TARGETS["llama.cpp"], ("Q4_0", "Q5_0"))
    params = {name: model.part(name) for name in model.params}
    runs = Runs(CONFIG, Windows(tokens, 4, "budget"), params).with_baseline()
    paths = [w.path for g in groups for w in g.weights]
    nearly = {"Q8_0 unmeasured": dict.fromkeys(paths, get_format("Q8_0"))}
    weights = sum(math.prod(w.shape) for g in groups for w in g.weights)
    seen = search(Rounder(runs, recipe("rtn")), runs, groups, 2 * weights, nearly, mend=False)
    assert seen.best.name == "Q8_0 unmeasured" and seen.best.predicted is None
    assert seen.plan().rules[0].format_name == "Q8_0"


def test_rows_count_what_the_plan_keeps(model, found):
    plan, seen = found
    rows = rows_of(CONFIG, plan, seen)
    whole = quantize_params(model.params, plan)[1].nbytes
    best = next(r for r in rows["plans"] if r["name"] == seen.best.name)
    assert best["bytes"] == whole == sum(r["bytes"] for r in rows["tensors"])
    assert {r["group"] for r in rows["costs"]} >= {"embed", "layers_0/attn/q+k", "layers_1/mlp/gate+up"}


def test_what_vllm_fuses_has_one_format():
    weights = decoder_weights(DecoderConfig(vocab=96, dim=128, hidden=256, layers=1, heads=1, kv_heads=1, head_dim=128))
    groups = groups_of(weights, TARGETS["vllm"])
    assert [g.name for g in groups] == [
        "layers_0/attn/q+k+v",
        "layers_0/attn/o",
        "layers_0/mlp/gate+up",
        "layers_0/mlp/down",
    ]
    assert [f.name for f in groups[0].formats] == ["int4_g128_mse", "int8_g128"]


def test_importance_grids_are_offered_where_rows_are_whole_blocks():
    weights = decoder_weights(dataclasses.replace(CONFIG, hidden=256))
    groups = {g.name: {f.name: f for f in g.formats} for g in groups_of(weights, TARGETS["llama.cpp"])}
    grids = {"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"}
    assert [name for name, formats in groups.items() if grids & {*formats}] == [f"layers_{i}/mlp/down" for i in (0, 1)]
    down = groups["layers_0/mlp/down"]
    assert grids < {*down} and next(iter(down)) == "IQ2_XXS"
    assert stored_size(down["IQ2_XXS"], (64, 256)) == 64 * 66  # ggml's block


@pytest.mark.slow
def test_a_small_budget_takes_importance_grids(tokens):
    config = dataclasses.replace(CONFIG, hidden=256, layers=1)
    params = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    plan, seen = plan_for(Model(config, params), tokens, bits=4.4, formats=("IQ2_XXS", "IQ3_S", "Q4_0", "Q5_0"))
    assert {rule.format_name for rule in plan.rules} & {"IQ2_XXS", "IQ3_S"}
    report = quantize_params(params, plan)[1]
    assert 8 * report.nbytes <= 4.4 * sum(math.prod(w.shape) for w in decoder_weights(config))
    assert seen.best.kl == min(c.kl for c in seen.candidates)


def test_unmeasured_costs_lie_on_lines_through_the_measured():
    errors = np.array([16.0, 4.0, 1.0, 0.25])
    np.testing.assert_allclose(interpolated(errors, {0: 8.0, 2: 1.0}), [8.0, 8**0.5, 1.0, 0.25])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "said once"),
        ({"bits": 4.0, "like": "Q4_0"}, "said once"),
        ({"bits": 2.0, "formats": FORMATS}, "more than the budget"),
        ({"bits": 4.0}, None),
        ({"bits": 4.0, "formats": ("Q4_0",)}, "two formats"),
        ({"bits": 4.0, "formats": ("Q4_K", "Q6_K")}, "divides its rows of 64"),
        ({"bits": 4.0, "recipe": "best_gguf"}, "cannot try formats"),
        ({"bits": 4.0, "target": "ollama"}, "unknown target"),
    ],
)
def test_bad_budgets_are_told(model, tokens, options, said):
    if said is None:
        with pytest.raises(UserError, match="two windows"):
            plan_for(model, tokens[:1], **options)
    else:
        with pytest.raises(UserError, match=said):
            plan_for(model, tokens, **options)
