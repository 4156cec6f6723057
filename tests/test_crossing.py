"""Any rounding on any format under any reparametrization traces, and what is refused stands in the docs' table."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax.errors import UserError
from qjax.formats.protocol import Shared
from qjax.recipes import RECIPES, REPARAMS, recipe
from qjax.reparam import Site, reparametrize, settle
from qjax.rounding.protocol import check_chain, requires, round_weight
from qjax.stats import Stats

ROWS, N = 8, 512
FLOATS = ("F32", "F16", "BF16")
DOCS = (Path(__file__).parents[1] / "docs" / "rounding.md").read_text()

# Recipe -> (which formats it does not run on, the words of the table in docs/rounding.md).
REFUSED = {
    "hqq": (lambda fmt: fmt.tile != (1, 1) or not has_offset(fmt), "formats without an offset"),
    "autoround": (lambda fmt: fmt.name in FLOATS, "F32, F16, BF16"),
    "aqlm": (lambda fmt: not isinstance(fmt, Shared), "formats without a codebook"),
    "gsq": (lambda fmt: fmt.tile != (1, 1) or fmt.name in FLOATS, "points of several weights"),
    "omniquant": (lambda fmt: fmt.name in FLOATS, "F32, F16, BF16"),
}


def rows_of(fmt):
    return max(ROWS, fmt.rows)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def zeros(*shape):
    return jnp.zeros(shape, jnp.float32)


STATS = Stats(
    H=zeros(N, N), cross=zeros(N, N), h=zeros(N), absmean=zeros(N), absmax=zeros(N), samples=zeros(64, N), count=zeros()
)


def has_offset(fmt):
    return jax.eval_shape(lambda w: fmt.columns(fmt.fit(w), w.shape), f32(rows_of(fmt), N))[-1] is not None


def traced(fmt, made):
    """The leaves of a weight through a whole recipe, as shapes."""

    def weight(w, stats):
        def loss(w, stats):
            return round_weight(w, fmt, made.roundings, stats, made.damping).error

        kept = requires(made.roundings) | {"H"}
        site, applied, found = reparametrize(made.reparams, Site(w, stats, fmt, loss), kept)
        done = round_weight(site.w, fmt, made.roundings, site.stats, made.damping)
        w_hat = fmt.decode(done.scales, done.codes)
        return fmt.pack(done.scales, done.codes), settle(applied, found, w_hat)

    check_chain(made.roundings, fmt, STATS)
    return jax.eval_shape(weight, f32(rows_of(fmt), N), STATS)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_on_every_format(name):
    refused, words = REFUSED.get(name, (lambda fmt: False, ""))
    for fmt in map(qjax.format, qjax.format_names()):
        if refused(fmt):
            with pytest.raises(UserError, match=fmt.name):
                traced(fmt, recipe(name))
        else:
            assert fmt.shape(traced(fmt, recipe(name))) == (rows_of(fmt), N), fmt.name
    rows = [line for line in DOCS.splitlines() if line.startswith(f"| `{name}`") and words in line]
    assert len(rows) == bool(words), f"docs/rounding.md: the table of refusals should say {words!r} of {name}"


ARGUMENTS = {"sparse": "(0.01)", "columns": "(0.02)", "low_rank": "(4)", "act": "('int8')"}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPARAMS)
def test_every_change_of_variables_in_front_of_feedback_on_every_family(name):
    made = recipe(f"{name}{ARGUMENTS.get(name, '()')} >> nearest('h') >> ldlq >> refit")
    for fmt in {type(getattr(fmt, "scaling", fmt)): fmt for fmt in map(qjax.format, qjax.format_names())}.values():
        assert traced(fmt, made), fmt.name
