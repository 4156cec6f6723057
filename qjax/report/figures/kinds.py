"""Which figure a table makes: its columns say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from qjax.errors import UserError, check_word
from qjax.report.figures import (
    amount,
    by_layer,
    curve,
    front,
    histogram,
    outliers,
    pareto,
    rates,
    roofline,
    scatter,
    tokens,
)
from qjax.report.figures.drawing import SLIM, WIDE, Drawing, on_page
from qjax.report.schema import Result, Table


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of figure.

    Attributes:
      needs: columns that a table must have; of "a|b" one is enough.
      draw: (table, width) -> the drawing, or None where too few rows have a place in it.
    """

    needs: tuple[str, ...]
    draw: Callable[[Table, float], Drawing | None]


KINDS = {
    "kl": Kind(("whole_bits", "kl|kl_mean"), pareto.DRAW["kl"]),
    "perplexity": Kind(("whole_bits", "perplexity"), pareto.DRAW["perplexity"]),
    "rates": Kind(("family", "layer_bits", "kl"), rates.draw),
    "amount": Kind(("calibration_tokens", "recipe", "kl_mean"), amount.draw),
    "bits": Kind(("layer", "kind", "bits", "bytes"), by_layer.draw_bits),
    "errors": Kind(("layer", "kind", "relative_rmse"), by_layer.draw_errors),
    "weights": Kind(("weight", "before"), histogram.DRAW["weight"]),
    "grid": Kind(("position", "before"), histogram.DRAW["position"]),
    "outliers": Kind(("layer", "group", "peak"), outliers.draw),
    "tokens": Kind(("quantile", "kl"), tokens.draw),
    "training": Kind(("step", "loss"), curve.DRAW["loss"]),
    "drift": Kind(("step", "scale_drift"), curve.DRAW["scale_drift"]),
    "roofline": Kind(roofline.KEYS, roofline.draw),
    "sum": Kind(("predicted", "kl"), scatter.draw),
}


def suits(kind: Kind, table: Table) -> bool:
    """Whether a table has the columns of a kind."""
    keys = {column.key for column in table.columns}
    return all(keys & set(need.split("|")) for need in kind.needs)


def drawn(kind: Kind, tables: Iterable[Table], width: float) -> Drawing | None:
    """The figure of the first table that makes one: those after it hold its single runs."""
    made = (kind.draw(table, width) for table in tables if suits(kind, table))
    return next((drawing for drawing in made if drawing is not None), None)


def figures(result: Result) -> list[str]:
    """Every figure that a result makes, as HTML, for a wide screen and for a phone."""
    made = (drawn(kind, result.tables, width) for kind in KINDS.values() for width in (WIDE, SLIM))
    return [on_page(drawing) for drawing in made if drawing is not None]


def one_figure(results: Sequence[Result], name: str, width: float = WIDE) -> Drawing:
    """One figure of several results: models of all of them on the same axes, or the first figure of that kind.

    Args:
      results: whose tables are looked at, in their order.
      name: of KINDS.
      width: of the figure.

    Raises:
      UserError: an unknown kind, or no table that makes one.
    """
    check_word("--figure", name, tuple(KINDS))
    tables = [table for result in results for table in result.tables]
    if name in front.MEASURES and len(results) > 1:
        tables = [front.together([(r.title, _any_suited(KINDS[name], r)) for r in results], name)]
    made = drawn(KINDS[name], tables, width)
    if made is None:
        needs = ", ".join(need.replace("|", " or ") for need in KINDS[name].needs)
        raise UserError(f"--figure {name}: no table makes one; it needs rows with {needs}")
    return made


def _any_suited(kind: Kind, result: Result) -> Table | None:
    """The table that makes a result's figure; of a run of one model, which makes none alone, the one with its row."""
    return first_suited(kind, result) or next((t for t in result.tables if suits(kind, t)), None)


def first_suited(kind: Kind, result: Result) -> Table | None:
    """The table that makes a result's figure of a kind."""
    return next((t for t in result.tables if suits(kind, t) and kind.draw(t, WIDE) is not None), None)
