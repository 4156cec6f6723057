"""What of a decoder is quantized while it trains: weights, and what flows between them.

    grid    = Grid("int2_g64_mid_mse", scales="learned")            as a config writes it
    quantizers_of(grid, config)                                     {path: Quantizer}

An `Arm` has both.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import jax
import jax.numpy as jnp

from qjax.errors import UserError, check_word
from qjax.formats import format_names
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.plan import FILE_TYPES, Plan, Rule
from qjax.plan.named import plan_named
from qjax.recipes import recipe
from qjax.reparam.inputs import Kind
from qjax.training.grid import weights
from qjax.training.grid.activations import quantized_cache
from qjax.training.grid.estimators import estimator
from qjax.training.grid.quantizer import SCALES, Quantizer, ScaleKind, check_scales
from qjax.training.grid.scale_rules import KINDS, Per, ScaleRule


@dataclasses.dataclass(frozen=True)
class Grid:
    """On which grid weights train.

    Attributes:
      format: that of the blocks' matrices, or a mix (Q4_K_M) for all; "" trains the float model.
      outside: the format of embedding and head where `format` is one for the blocks; "keep" leaves them.
      rules: (pattern, format) pairs that are asked before those.
      scales: refit, frozen, learned or decoupled.
      rule: where scales come from; "own" or see `scale_rules`, "absmean/matrix" for one of a matrix.
      estimator: "" for the default of the scales; else as `estimators.estimator` reads it.
      refresh_every: of frozen scales, in steps; 0: never.
      init: a recipe that makes the start ("gptq", "best_gguf"); "": the weights as they are.
    """

    format: str = ""
    outside: str = "Q8_0"
    rules: tuple[tuple[str, str], ...] = ()
    scales: ScaleKind = "refit"
    rule: str = "own"
    estimator: str = ""
    refresh_every: int = 0
    init: str = ""

    def __post_init__(self) -> None:
        """All that a grid alone can be wrong in, for what comes before its first step may be expensive."""
        check_word("scales", self.scales, SCALES)
        kind, _, per = self.rule.partition("/")
        check_word("rule", kind, KINDS)
        check_word("what shares a scale of the rule", per or "group", get_args(Per))
        check_scales(self.scales, self.scale_rule)
        if self.refresh_every < 0:
            raise UserError(f"refresh_every must not be negative, got {self.refresh_every}")
        if self.refresh_every and self.scales != "frozen":
            raise UserError(f"refresh_every is for frozen scales, and these are {self.scales}")
        if self.init:
            recipe(self.init)
            if not self.format:
                raise UserError(f"init {self.init!r} rounds to a format; name one")
            if self.scales == "refit":
                raise UserError("refit scales would not keep a recipe's grid; take frozen or learned ones, or no init")
        if self.estimator:
            estimator(self.estimator)
        if self.format and not self._mixes:
            self._formats()
        if self.rules:
            Plan.from_dict({"rules": dict(self.rules)}, "grid")

    @property
    def scale_rule(self) -> ScaleRule:
        """`rule`, read."""
        kind, _, per = self.rule.partition("/")
        return ScaleRule(kind, per or "group")  # type: ignore[arg-type]

    @property
    def _mixes(self) -> bool:
        return self.format.upper() in FILE_TYPES and self.format not in format_names()

    def _formats(self) -> Plan:
        return Plan.from_dict({"rules": {"layers_*": self.format, "*": self.outside}}, "grid")

    def plan(self, config: DecoderConfig) -> Plan:
        """Which weight gets which format."""
        plan = plan_named(self.format, config) if self._mixes else self._formats()
        return plan.with_rules([Rule(pattern, fmt) for pattern, fmt in self.rules])


@dataclasses.dataclass(frozen=True)
class Activations:
    """How what flows is rounded.

    Attributes:
      inputs: "" or int8, int4, e4m3, e5m2: the inputs of every block's linear layers.
      cache: "" or the format of keys and values in the cache, behind a rotation if need be: "hadamard() >> Q4_0".
    """

    inputs: str = ""
    cache: str = ""

    def __post_init__(self) -> None:
        check_word("inputs", self.inputs, (*get_args(Kind), ""))
        if self.cache:
            quantized_cache(self.cache)


def quantizers_of(grid: Grid, config: DecoderConfig) -> dict[str, Quantizer]:
    """{path: Quantizer} of a decoder's weights; {} for the float model. The grid's rule is for the blocks' weights."""
    if not grid.format:
        return {}
    how = estimator(grid.estimator) if grid.estimator else None
    all_own = weights.quantizers_of(shapes_of(config), grid.plan(config), scales=grid.scales, estimator=how)
    return {
        path: dataclasses.replace(q, rule=grid.scale_rule) if path.startswith("layers_") else q
        for path, q in all_own.items()
    }


def shapes_of(config: DecoderConfig) -> Any:
    """The params tree of a decoder, as shapes."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
