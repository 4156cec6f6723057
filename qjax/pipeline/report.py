"""What became of every tensor: its format, bits per weight and error, or why it was kept.

error = sqrt(sum (w - w_hat)^2 / sum w^2)        bits per weight = 8 bytes / weights, whole model
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rich.table import Table


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """How a weight was rounded in the metric of its inputs.

    Attributes:
      first_loss, loss: tr(E H E^T) / tr(W H W^T) of the first stage (scales fitted, nearest codes) and at the end, on
        the tokens that made H; E is what is missing from the target: W, or with a cross term W corrected for what its
        input has become.
      first_heldout_loss, heldout_loss: the same on tokens that did not; None where none were held out.
      damping: lambda of H + lambda diag(H) in force.
      tokens: seen at the weight's input.
      seconds: spent on the weight, statistics not included; weights rounded together share them.
      note: what a reader should know, as that it saw fewer tokens than it has inputs.
    """

    first_loss: float | None
    loss: float | None
    first_heldout_loss: float | None
    heldout_loss: float | None
    damping: float
    tokens: int
    seconds: float
    note: str = ""


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
    """Every tensor of a quantized model, in the model's order."""

    tensors: tuple[TensorReport, ...]

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
            "tensors": [t.to_dict() for t in self.tensors],
        }

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
            row = [t.name, " x ".join(map(str, t.shape)), t.format, f"{t.bits_per_weight:.4g}", error]
            table.add_row(*row, *(_calibration_cells(t.calibration) if calibrated else ()))
        return table


def _calibration_cells(c: CalibrationReport | None) -> tuple[str, ...]:
    """Losses before -> after, and the damping."""
    if c is None:
        return "", "", ""

    def pair(before: float | None, after: float | None) -> str:
        return "" if before is None or after is None else f"{before:.3g} -> {after:.3g}"

    return pair(c.first_loss, c.loss), pair(c.first_heldout_loss, c.heldout_loss), f"{c.damping:.3g}"
