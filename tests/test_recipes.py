"""Recipes: printed, read back, equal, named in plans; every wrong line says what is wrong with it."""

import functools
import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import recipe, recipes
from qjax.errors import UserError
from qjax.pipeline import quantize_params
from qjax.plan import Plan, Rule
from qjax.recipes import RECIPES, Recipe
from qjax.reparam import hadamard, permute, smooth
from qjax.rounding import descend, ldlq, nearest, refit, spqr
from qjax.stats import Stats

LINES = [
    *RECIPES,
    *(f"{name}:Q4_0" for name in RECIPES),
    "nearest()",
    "nearest('h') >> ldlq >> refit",
    "Q3_K >> nearest(weight='h') >> ldlq(order='group', grid='dynamic', cross=0.5) >> descend(2) >> refit(4, sweeps=2)",
    "nearest() >> options(damping=0.01, sequential=False, sensitive=True)",
    "int4_g128 >> nearest",
]


@pytest.mark.parametrize("line", LINES)
def test_printed_and_read_back(line):
    made = recipe(line)
    again = recipe(str(made))
    assert again == made and hash(again) == hash(made) and str(again) == str(made)
    assert recipe(made) is made
    assert recipe(json.loads(json.dumps(str(made)))) == made


def test_no_two_named_recipes_are_equal():
    made = [recipe(name) for name in RECIPES]
    assert len(set(made)) == len(RECIPES) and [m.name for m in made] == list(RECIPES)
    assert all(m.format is None for m in made)


def test_what_the_names_stand_for():
    assert recipe("rtn") == Recipe((nearest(),))
    assert recipe("imatrix") == Recipe((nearest("h"),), sequential=False)
    assert recipe("gptq") == recipe("nearest() >> ldlq()")
    assert recipe("gptaq") == recipe("nearest() >> ldlq(cross=1.0)")
    assert recipe("best_gguf:Q3_K").format is qjax.format("Q3_K")
    assert recipe("best_gguf:Q3_K") == recipe("best_gguf").on("Q3_K") != recipe("best_gguf")
    assert recipes.gptq(3, group=64).format.levels.bits == 3 and recipes.gptq(3, group=64).format.block == 64
    assert (
        recipe("quip_sharp(3)").format.name == "E8P_3" and recipes.qtip(4, 10, "hyb").format.name == "trellis4_L10_hyb"
    )
    assert recipes.gptaq(alpha=0.5).roundings[1].cross == 0.5


def test_stages_are_appended_by_arrows():
    made = recipes.rtn("Q4_K") >> ldlq("group") >> descend(2) >> refit(1)
    assert made == recipe("Q4_K >> nearest >> ldlq('group') >> descend(2) >> refit(1)")
    assert made.name == "" and made.format.name == "Q4_K"


def test_anything_composes_with_anything_and_lines_say_the_same():
    Q4_K, rotate = qjax.format("Q4_K"), hadamard(seed=3)
    same = {
        "hadamard(seed=3) >> gptq": rotate >> recipe("gptq"),
        "hadamard(seed=3) >> gptq(3, group=64)": rotate >> recipes.gptq(3, group=64),
        "hadamard(seed=3) >> best_gguf:Q4_K": rotate >> recipes.best_gguf("Q4_K"),
        "smooth(0.8) >> hadamard(seed=3) >> Q4_K >> nearest >> ldlq": smooth(0.8)
        >> (rotate >> Q4_K >> nearest() >> ldlq()),
        "Q4_K >> nearest >> ldlq": Q4_K >> nearest() >> ldlq(),
        "nearest('h') >> ldlq >> descend(2)": nearest("h") >> ldlq() >> descend(2),
        "Q4_K >> gptq >> descend(2)": Q4_K >> recipe("gptq") >> descend(2),
        "smooth(0.8) >> quip": smooth(0.8) >> recipe("quip"),
        "rtn:Q4_K >> ldlq >> options(damping=0.1)": recipes.rtn("Q4_K") >> recipe("ldlq >> options(damping=0.1)"),
        "gptq(bits=3):Q4_K": recipes.gptq(bits=3).on("Q4_K"),
        "permute >> spqr(0.3)": permute() >> spqr(0.3),  # the rounding, and the recipe:
        "permute >> spqr:int3_g16": permute() >> recipes.spqr(format="int3_g16"),
    }
    for line, chain in same.items():
        made = recipe(line)
        assert made == recipe(chain), line
        assert recipe(str(made)) == made, line
    assert recipe("rtn:Q4_K >> ldlq >> options(damping=0.1)").damping == 0.1
    assert recipe("hadamard() >> best_gguf").sensitive  # a recipe's options come along
    assert recipe("spqr").roundings == (spqr(0.2),) and recipe("spqr()").format is None
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
    tree, plan = {"w": {"kernel": w}}, "int4_g32"
    ours, lines = (
        quantize_params(tree, plan, recipe=r)[0] for r in (rotate >> nearest(), "hadamard(seed=3) >> nearest()")
    )
    np.testing.assert_array_equal(qjax.dequantize(ours["w"]["kernel"]), qjax.dequantize(lines["w"]["kernel"]))


@pytest.mark.parametrize("parts, message", [
    (lambda: qjax.format("Q4_K") >> hadamard() >> nearest(), "hadamard is a reparametrization and belongs in front"),
    (lambda: recipes.gptq() >> hadamard(), "hadamard is a reparametrization and belongs in front"),
    (lambda: recipes.rtn("Q4_K") >> qjax.format("Q4_0"), "two formats, Q4_K and Q4_0"),
    (lambda: nearest() >> qjax.format("Q4_0"), "the format Q4_0 belongs in front of the roundings"),
    (lambda: recipe("rtn") >> nearest("h"), r"nearest\(weight='h'\) fits the scales, which only the first"),
    (lambda: hadamard() >> qjax.format("Q4_0"), "needs at least one rounding"),
    (lambda: recipe("rtn >> options(damping=0.1)") >> recipe("ldlq >> options(damping=0.2)"), "damping is 0.1 and 0.2"),
    (lambda: recipe("rtn") >> "Q4_0", "is no format, reparametrization, rounding or recipe"),
])  # fmt: skip
def test_orders_that_mean_nothing(parts, message, without_type_checks):
    with pytest.raises(UserError, match=message):
        recipe(parts())


@pytest.mark.parametrize("line, needs", [
    ("rtn", ""), ("imatrix", "h"), ("gptq", "H"), ("gptaq", "H cross"), ("best_gguf", "H cross h"),
    ("quip_sharp", "H"), ("qtip(3, L=10, code='mul1')", "H"),
    ("nearest >> descend", "H"), ("nearest >> refit", "H"),
])  # fmt: skip
def test_what_it_needs(line, needs):
    assert recipe(line).requires == frozenset(needs.split())


MISTAKES = [
    ("gptk", "unknown recipe 'gptk'; did you mean gptq?"),
    ("zzz", "there are rtn, imatrix, gptq"),
    ("gptq:Q4_9", "unknown format 'Q4_9'"),
    ("gptq:", "unknown format ''"),
    ("Q4_9 >> nearest()", "unknown format 'Q4_9'"),
    ("nearest() >> ldlk()", "unknown stage 'ldlk'; there are nearest, ldlq"),
    ("nearest() >> gptq", "fits the scales, which only the first rounding may do"),
    ("nearest() >> ldlq(order='random')", "order"),
    ("nearest() >> ldlq(speed=3)", "unexpected keyword argument 'speed'"),
    ("nearest() >> descend(1, 2)", "descend(1, 2)"),
    ("nearest() >> descend(0)", "sweeps must be at least 1"),
    ("nearest() >> descend('two')", "descend"),
    ("nearest() >> refit(0)", "at least 1"),
    ("nearest('x')", "weight"),
    ("nearest() >> ldlq(grid='dynamic')", "act order tears blocks apart"),
    ("nearest() >> ldlq(order=open('x'))", "arguments must be plain values"),
    ("nearest() >> ldlq(*[1])", "arguments must be plain values"),
    ("nearest() >> ldlq(**{'order': 'act'})", "ldlq"),
    ("qtip(5)", "a trellis has 1 to 4 bits a weight"),
    ("quip_sharp(5)", "unknown format 'E8P_5'"),
    ("nearest() >>", "is neither a format nor a stage"),
    ("nearest() >> 3", "is no stage"),
    ("nearest() >> a.b()", "is no stage"),
    ("nearest() >> __import__('os').system('true')", "is no stage"),
    ("Q4_0 >> Q8_0 >> nearest()", "two formats, Q4_0 and Q8_0"),
    ("options(damping=0.1)", "needs at least one rounding"),
    ("nearest() >> options(damping=0.0)", "damping must be positive"),
    ("nearest() >> options(damping=-0.1)", "damping must be positive"),
    ("nearest() >> options(damping='much')", "damping"),
    ("nearest() >> options(damp=0.1)", "damp"),
    ("nearest() >> options(roundings=())", "roundings"),
    ("nearest() >> options(0.1)", "name each option"),
    ("", "unknown recipe ''"),
]


@pytest.mark.parametrize("line, message", MISTAKES)
def test_mistakes_are_named(line, message):
    with pytest.raises(UserError) as e:
        recipe(line)
    assert message in str(e.value), str(e.value)


@pytest.mark.parametrize("line, message", MISTAKES)
def test_and_named_alike_without_the_tests_type_checks(line, message):
    """In a process without jaxtyping's hook; all at once, see `unchecked`."""
    assert message in unchecked()[line] and "\n" not in unchecked()[line]


@functools.cache
def unchecked():
    """{line: what is said about it} from a plain interpreter."""
    script = "import json, sys; from qjax import recipe\nsaid = {}\nfor line in json.load(sys.stdin):\n"
    script += " try: recipe(line)\n except ValueError as e: said[line] = str(e)\nprint(json.dumps(said))"
    lines = json.dumps([line for line, _ in MISTAKES])
    done = subprocess.run([sys.executable, "-c", script], input=lines, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


# --- in plans ---------------------------------------------------------------------------------------------------------

RULES = {"a/kernel": "gptq:int4_g32", "b/kernel": "Q4_0", "c/kernel": "keep", "*": "imatrix:Q4_0"}


def test_a_plan_names_recipes(tmp_path):
    plan = Plan.from_dict({"rules": RULES})
    (tmp_path / "plan.toml").write_text(plan.to_toml())
    assert Plan.from_toml(tmp_path / "plan.toml") == plan == Plan.from_dict(plan.to_dict())
    assert plan.to_dict()["rules"] == RULES
    assert "a/kernel -> gptq:int4_g32" in str(plan)
    assert Plan((Rule("*", recipe("gptq:int4_g32")),)).to_dict()["rules"] == {"*": "gptq:int4_g32"}


def test_a_rule_with_a_recipe_of_ones_own_is_written_and_read(tmp_path):
    made = recipe("int4_g32 >> nearest >> descend(2)")
    plan = Plan((Rule("*", made),))
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    weights = [qjax.plan.Weight("a/kernel", (64, 64))]
    assert again.assign(weights)[0].recipe == plan.assign(weights)[0].recipe == made
    assert again.assign(weights)[0].format.name == "int4_g32"


def test_recipes_that_differ_in_an_argument_stay_apart():
    """Their names and formats are equal, or there is no name."""
    pairs = [
        (recipes.gptaq(format="int4_g32", alpha=0.5), recipes.gptaq(format="int4_g32")),
        (recipe("int4_g32 >> nearest >> descend(2)"), recipe("int4_g32 >> nearest >> descend(3)")),
    ]
    for a, b in pairs:
        plan = Plan((Rule("a/*", a), Rule("b/*", b)))
        for p in (plan, Plan.from_dict(plan.to_dict())):
            weights = [qjax.plan.Weight(f"{k}/kernel", (64, 64)) for k in "ab"]
            assert [x.recipe for x in p.assign(weights)] == [a, b]


@pytest.mark.parametrize("spec, message", [
    ("gptq:", "unknown format ''"),
    ("gptk:Q4_0", "did you mean gptq?"),
    ("nearest() >> descend(2)", "needs a format"),
    ("nearest() >> nothing()", "unknown stage"),
])  # fmt: skip
def test_mistakes_in_a_plan_name_the_rule(spec, message):
    with pytest.raises(UserError, match=r"rules.'x/") as e:
        Plan.from_dict({"rules": {"x/*": spec}})
    assert message in str(e.value)


@pytest.fixture
def problem(rng):
    params = {k: {"kernel": jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)} for k in "abcd"}
    x = rng.standard_normal((256, 64)) @ rng.standard_normal((64, 64))
    H = jnp.asarray(x.T @ x / 256, jnp.float32)
    return params, {f"{k}/kernel": Stats(H=H, count=jnp.float32(256)) for k in "abd"}


@pytest.mark.slow
def test_quantize_params_follows_the_rules(problem):
    """gptq where the rule says so, the caller's recipe where it does not, imatrix for the rest."""
    params, stats = problem
    q, report = quantize_params(params, Plan.from_dict({"rules": RULES}), stats, recipe="nearest >> descend(1)")
    lines = {t.name: t for t in report.tensors}
    formats = {name: t.format for name, t in lines.items()}
    assert formats == {"a/kernel": "int4_g32", "b/kernel": "Q4_0", "c/kernel": "float32", "d/kernel": "Q4_0"}
    for path, line in (("a", "gptq:int4_g32"), ("b", "nearest >> descend(1)")):
        rule = recipe(line) if ":" in line else recipe(line).on("Q4_0")
        alone, _ = quantize_params(
            {path: params[path]}, Plan((Rule("*", rule),)), {f"{path}/kernel": stats["a/kernel"]}
        )
        assert (qjax.dequantize(alone[path]["kernel"]) == qjax.dequantize(q[path]["kernel"])).all()
        losses = lines[f"{path}/kernel"].calibration
        assert losses.loss < losses.first_loss and losses.tokens == 256 and losses.damping >= 0.05
    d = params["d"]["kernel"]
    h = jnp.diag(stats["d/kernel"].H)
    expected = qjax.quantize(d, "Q4_0", axis=-2, weight=h)

    def loss(q):
        return float(jnp.sum(h[:, None] * (qjax.dequantize(q) - d) ** 2))

    assert loss(q["d"]["kernel"]) == pytest.approx(loss(expected), rel=1e-3)
    assert not np.array_equal(qjax.dequantize(q["d"]["kernel"]), qjax.dequantize(qjax.quantize(d, "Q4_0", axis=-2)))
