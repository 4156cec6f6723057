"""What became of every tensor: its format, bits per weight and error, or why it was kept.

error = sqrt(sum (w - w_hat)^2 / sum w^2)        bits per weight = 8 bytes / weights, whole model
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from qjax.tables import html_table, number, size, text_table
from qjax.terminal import shown


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """How a weight was rounded in the metric of its inputs.

    Attributes:
      first_loss, loss: tr(E H E^T) / tr(W H W^T) of the first stage (scales fitted, nearest codes) and at the end, on
        the tokens that made H; E is what is missing from the target: W, or with a cross term W corrected for what its
        input has become. Where rows were rounded for each other, tr(G E H E^T) / tr(G W H W^T).
      first_heldout_loss, heldout_loss: the same on tokens that did not; None where none were held out.
      damping: lambda of H + lambda diag(H) in force.
      tokens: seen at the weight's input; of a stack, at that of the matrix that saw the fewest.
      effective_tokens, effective_windows: as many that count alike would know as much, where tokens do not count alike.
      seconds: spent on the weight, statistics not included; weights rounded together share them.
      note: what a reader should know, as that it saw fewer tokens than it has inputs.
      shrinkage, cross_share: how far H was shrunk toward its diagonal, and the share of the cross term that was taken;
        None where the recipe does not shrink.
      output_shrinkage: how far G of the output was shrunk toward its diagonal; None where rows were rounded alone: the
        recipe is not two-sided, G is not known, or held-out tokens saw nothing to gain.
      guarded: whether the fit weighted by E[x^2] was taken, for held-out tokens liked it better.
      by_matrix: tokens seen by each matrix of a stack, experts as a rule; () where it is no stack.
    """

    first_loss: float | None
    loss: float | None
    first_heldout_loss: float | None
    heldout_loss: float | None
    damping: float
    tokens: int
    seconds: float
    note: str = ""
    effective_tokens: float | None = None
    effective_windows: float | None = None
    shrinkage: float | None = None
    cross_share: float | None = None
    guarded: bool = False
    output_shrinkage: float | None = None
    by_matrix: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, said: dict[str, Any]) -> CalibrationReport:
        """The inverse of `dataclasses.asdict`, through JSON."""
        return cls(**said | {"by_matrix": tuple(said.get("by_matrix", ()))})


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """One tensor of a quantized model.

    Attributes:
      name: its path in the params tree or its name in the file.
      shape: its shape, contracted axis last.
      format: the format's name, or the type it was kept in.
      nbytes: bytes stored, scales included.
      error: relative root mean square error, None where nothing was rounded.
      kept: why it was kept, None where it was quantized.
      calibration: what a calibrated rounding did, None where there was none.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int
    error: float | None = None
    kept: str | None = None
    calibration: CalibrationReport | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.size if self.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"shape": list(self.shape), "bits_per_weight": self.bits_per_weight}


@dataclasses.dataclass(frozen=True)
class Report:
    """Every tensor of a quantized model, in the model's order.

    Attributes:
      tensors: a line each.
      notes: what a reader should know of the whole, as that types were replaced because rows do not fit them.
      tuned: what gradients on the whole model did, tuning behind the rounding or rotations in front of it; {"said": one
        line, ...}.
    """

    tensors: tuple[TensorReport, ...]
    notes: tuple[str, ...] = ()
    tuned: Mapping[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model, kept tensors included."""
        size = sum(t.size for t in self.tensors)
        return 8 * self.nbytes / size if size else 0.0

    @property
    def formats(self) -> dict[str, int]:
        """Format name -> weights in it, the commonest first."""
        sizes: dict[str, int] = {}
        for t in self.tensors:
            sizes[t.format] = sizes.get(t.format, 0) + t.size
        return dict(sorted(sizes.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with stable keys."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "nbytes": self.nbytes,
            "formats": self.formats,
            "notes": list(self.notes),
            "tensors": [t.to_dict() for t in self.tensors],
        }

    def summary(self) -> tuple[tuple[str, ...], list[tuple[str, ...]], tuple[int, ...]]:
        """Heads, one row a format and one for all, and which columns are numbers; errors and losses are means over
        weights."""
        parts = [(name, [t for t in self.tensors if t.format == name]) for name in self.formats]
        heads: tuple[str, ...] = ("format", "tensors", "weights", "size", "bits/weight", "rel. error")
        calibrated = any(t.calibration for t in self.tensors)
        heads += ("loss", "held out") if calibrated else ()
        rows = [_summed(name, tensors, calibrated) for name, tensors in (*parts, ("all", list(self.tensors)))]
        return heads, rows, tuple(range(1, len(heads)))

    @property
    def _title(self) -> str:
        return (
            f"{len(self.tensors)} tensors, {number(sum(t.size for t in self.tensors))} weights, {size(self.nbytes)}, "
            f"{self.bits_per_weight:.4g} bits per weight"
        )

    def __repr__(self) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        return f"Report({self._title}: {', '.join(f'{f} {number(n)}' for f, n in self.formats.items())}{notes})"

    def __str__(self) -> str:
        return "\n".join((text_table(*self.summary()), *self.notes))

    def _repr_html_(self) -> str:
        return html_table("; ".join((f"Report: {self._title}", *self.notes)), *self.summary())

    def table(self) -> Table:
        """For `rich.print`: one line a tensor and the total."""
        table = Table(show_footer=True)
        table.add_column("tensor", footer="all")
        table.add_column("shape", justify="right")
        table.add_column("format", footer=", ".join(self.formats))
        table.add_column("bits/weight", justify="right", footer=f"{self.bits_per_weight:.4f}")
        table.add_column("rel. error", justify="right", footer=f"{self.nbytes:,} bytes")
        calibrated = any(t.calibration for t in self.tensors)
        if calibrated:
            table.add_column("loss", justify="right")
            table.add_column("held out", justify="right")
            table.add_column("damping", justify="right")
        for t in self.tensors:
            error = f"[dim]kept: {t.kept}[/]" if t.kept else "" if t.error is None else f"{t.error:.5f}"
            row = [" x ".join(map(str, t.shape)), t.format, f"{t.bits_per_weight:.4g}", error]
            table.add_row(Text(shown(t.name)), *row, *(_calibration_cells(t.calibration) if calibrated else ()))
        return table


def _summed(name: str, tensors: Sequence[TensorReport], calibrated: bool) -> tuple[str, ...]:
    """A row of `Report.summary`."""
    weights, nbytes = sum(t.size for t in tensors), sum(t.nbytes for t in tensors)

    def mean(values: Sequence[tuple[float | None, int]]) -> str:
        known = [(v, n) for v, n in values if v is not None]
        return f"{sum(v * n for v, n in known) / sum(n for _, n in known):.3g}" if known else ""

    def pair(before: str, after: str) -> str:
        lines = [(t.calibration, t.size) for t in tensors if t.calibration is not None]
        ends = [mean([(getattr(c, kind), n) for c, n in lines]) for kind in (before, after)]
        return " -> ".join(ends) if all(ends) else ""

    losses = (pair("first_loss", "loss"), pair("first_heldout_loss", "heldout_loss")) if calibrated else ()
    bits, error = f"{8 * nbytes / max(weights, 1):.4g}", mean([(t.error, t.size) for t in tensors])
    return name, str(len(tensors)), f"{weights:,}", size(nbytes), bits, error, *losses


def _calibration_cells(c: CalibrationReport | None) -> tuple[str, ...]:
    """Losses before -> after, and the damping."""
    if c is None:
        return "", "", ""

    def pair(before: float | None, after: float | None) -> str:
        return "" if before is None or after is None else f"{before:.3g} -> {after:.3g}"

    return pair(c.first_loss, c.loss), pair(c.first_heldout_loss, c.heldout_loss), f"{c.damping:.3g}"
