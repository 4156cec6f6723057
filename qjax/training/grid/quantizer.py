"""How one weight is quantized while it trains: a format, where its scales come from, what passes back.

    refit       scales of the weights at every step                       w_hat = decode(encode(w))
    frozen      scales of the weights at the last refresh                 w_hat = decode(scales, nearest(scales, w))
    learned     scales, and offsets where the format has them, train      w_hat = learned_quant(grid(parameters), w)
    decoupled   learned, with a threshold of its own

`encode` is what is stored and `fake` its value, bit for bit: export packs what `encode` returns.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from qjax.errors import UserError
from qjax.formats import sound
from qjax.formats.protocol import Format, Scales
from qjax.tensor import QTensor, importance_rows
from qjax.training.grid.estimators import Estimator, clipped, position_of, ste
from qjax.training.grid.fake_quant import decoded, encoded, rounded, straight_through
from qjax.training.grid.learned_grid import encode_on, learned_quant, moved, start
from qjax.training.grid.scale_rules import OWN, ScaleRule
from qjax.typing import Array, Float

ScaleKind = Literal["refit", "frozen", "learned", "decoupled"]
SCALES = ("refit", "frozen", "learned", "decoupled")


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """See the module's docstring.

    Attributes:
      format: the format.
      axis: the contracted axis of the weight.
      scales: "refit", "frozen", "learned" or "decoupled".
      estimator: None: `ste()` for scales that follow the weights, `clipped()` for learned ones.
      rule: where scales come from, at every step, at a refresh, at the start.
    """

    format: Format
    axis: int = -1
    scales: ScaleKind = "refit"
    estimator: Estimator | None = None
    rule: ScaleRule = OWN

    def __post_init__(self) -> None:
        check_scales(self.scales, self.rule)

    @property
    def trains(self) -> bool:
        """Whether it has parameters of its own."""
        return self.scales in ("learned", "decoupled")

    def init(self, w: Float[Array, "*w"], weight: Array | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """What trains and what is constant beside the weight.

        Args:
          w: the weight at the moment when quantization begins.
          weight: importance of each weight for the format's own search, of w's shape or one for each of `axis`.

        Returns: {"scale", "offset", "threshold"} or {}, and {"scales", "at"} or {}.
        """
        if self.scales == "refit":
            return {}, {}
        return _init(self, w, weight)

    def init_from(self, q: QTensor) -> tuple[dict[str, Any], dict[str, Any]]:
        """`init` on the scales that any recipe chose: training goes on from its grid.

        Raises:
          UserError: another format or axis, or codes behind a reparametrization.
        """
        if q.format != self.format or q.axis != self.axis or q.applied:
            raise UserError(f"{q} along axis {q.axis} does not fit {self.format.name} along axis {self.axis}")
        scales, codes = q.format.unpack(q.leaves)
        if self.scales == "refit":
            return {}, {}
        return self._beside(scales, jnp.shape(codes), None)

    def _beside(self, scales: Scales, shape: tuple[int, ...], p: Array | None) -> tuple[dict[str, Any], dict[str, Any]]:
        if not self.trains:
            return {}, {"scales": scales}
        if self.scales == "decoupled" and p is None:
            p = self.format.columns(scales, shape)[0]
        parameters, at = start(self.format, scales, shape, p)
        return parameters, {"scales": scales, "at": at}

    def encode(self, w: Float[Array, "*w"], trained: dict[str, Any], constants: dict[str, Any]) -> tuple[Scales, Array]:
        """Scales and codes, contracted axis last: what a file stores."""
        x = self._rows(w)
        if self.trains:
            return encode_on(self.format, constants["scales"], moved(trained, constants["at"]), x)
        if self.scales == "frozen":
            return sound.marked(constants["scales"], x), rounded(self.format, constants["scales"], x)
        return self._fitted(x, None)[:2]

    def fake(self, w: Float[Array, "*w"], trained: dict[str, Any], constants: dict[str, Any]) -> Float[Array, "*w"]:
        """The stored weight's value, f32, with gradients by w and by what trains."""
        w = w.astype(jnp.float32)
        if self.trains:
            estimator = self.estimator or clipped()
            return learned_quant(
                self.format, estimator, self.axis, constants["scales"], moved(trained, constants["at"]), w
            )
        still = lax.stop_gradient((w, constants))
        scales, codes = self.encode(still[0], {}, still[1])
        value = jnp.moveaxis(decoded(self.format, scales, codes), -1, self.axis)
        return straight_through(self.format, self.estimator or ste(), self.axis, w, value, scales)

    def pack(self, w: Float[Array, "*w"], trained: dict[str, Any], constants: dict[str, Any]) -> QTensor:
        """The weight as it is stored; `qjax.dequantize` of it equals `fake` bit for bit."""
        leaves = self.format.pack(*self.encode(w, trained, constants))
        return QTensor(leaves, self.format, self.axis, dtype=w.dtype)

    def saturated(self, w: Float[Array, "*w"], scales: Scales, codes: Array) -> Float[Array, ""]:
        """The share of weights outside of the cells of the grid."""
        place = position_of(self.format, scales, self._rows(w), self.format.decode(scales, codes))
        return 1.0 - jnp.mean(place.inside("cells").astype(jnp.float32))

    def _rows(self, w: Array) -> Array:
        return jnp.moveaxis(w.astype(jnp.float32), self.axis, -1)

    def _fitted(self, x: Array, weight: Array | None) -> tuple[Scales, Array, Array | None]:
        """Scales and codes of the rule for x, and the threshold scale p that chose the codes."""
        if self.rule.kind == "own":
            return (*encoded(self.format, x, weight), None)
        kept = encoded(self.format, x, weight)[0]
        grid = self.rule(self.format, x)
        offset = self.format.columns(kept, x.shape)[1]
        grid |= {} if offset is None else {"m": offset}
        return (*encode_on(self.format, kept, grid, x), grid.get("p"))


def check_scales(scales: str, rule: ScaleRule) -> None:
    """Raise UserError for a kind of scales that there is not, or that the rule does not go with."""
    if scales not in SCALES:
        raise UserError(f"scales must be {', '.join(SCALES)}, got {scales!r}")
    if rule.kind == "twn" and scales in ("frozen", "learned"):
        raise UserError("the rule twn has a threshold of its own: take scales = refit or decoupled")


@partial(jax.jit, static_argnums=0)
def _init(quantizer: Quantizer, w: Array, weight: Array | None) -> tuple[dict[str, Any], dict[str, Any]]:
    x = quantizer._rows(w)
    scales, _, p = quantizer._fitted(x, importance_rows(weight, x, quantizer.axis))
    return quantizer._beside(scales, x.shape, p)
