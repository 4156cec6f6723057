"""One way to train a model through its quantization, as a config writes it; experiments compare arms.

    arm = Arm("q2", format="int2_g64_mid_mse", scales="learned", loss="0.5*ce + 0.5*fkl", rate=5e-4)
    quantizers_of_arm(arm, config)      {path: Quantizer}

`finetune` runs it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from qjax.errors import UserError
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
from qjax.training.losses.objectives import parse_terms

Shape = Literal["cosine", "constant", "cooldown"]
Prox = Literal["", "parq", "relax"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train; every field is a config's.

    Attributes:
      name: what the tables call it.
      format: that of the blocks' matrices, or a mix (Q4_K_M) for all; "" trains the float model.
      outside: the format of embedding and head where `format` is one for the blocks; "keep" leaves them.
      rules: (pattern, format) pairs that are asked before those.
      scales: refit, frozen, learned or decoupled.
      rule: where scales come from; "own" or see `scale_rules`, "absmean/matrix" for one of a matrix.
      estimator: "" for the default of the scales; else as `estimators.estimator` reads it.
      refresh_every: of frozen scales, in steps; 0: never.
      init: a recipe that makes the start ("gptq", "best_gguf"); "": the weights as they are.
      loss: see `objectives.parse_terms`.
      temperature: T of its divergences, of a cached teacher's too.
      trains: parts that train: "weights", "scales"; of learned scales with frozen weights codes may move.
      inputs: "" or int8, int4, e4m3, e5m2: the inputs of every block's linear layers.
      cache: "" or the format of keys and values in the cache, behind a rotation if need be: "hadamard() >> Q4_0".
      rate, scale_rate: the peak learning rates; scale_rate 0: ten times the rate.
      weight_decay, clip, warmup: of AdamW; warmup is a share of the steps.
      shape: what follows the warm-up: "cosine" to 0; "constant", where the cooldown is another run's; or "cooldown",
        constant first, and in the end to 0 as 1 - sqrt.
      cooldown: of the shape "cooldown", how long the fall is, as a share of the steps.
      ema: decay of the moving average that is exported; 0: none.
      prox: "" quantizes the weights in every forward; "parq" or "relax" draws them to the grid by a proximal map in the
        optimizer (`parq`), around latent weights, of which the export is made.
      prox_span: where in the run the drawing begins and where all weights are on the grid, as shares of the steps.
      vocab_chunk: tokens of the vocabulary whose logits are held at a time; 0: all.
    """

    name: str
    format: str = ""
    outside: str = "Q8_0"
    rules: tuple[tuple[str, str], ...] = ()
    scales: ScaleKind = "refit"
    rule: str = "own"
    estimator: str = ""
    refresh_every: int = 0
    init: str = ""
    loss: str = "ce"
    temperature: float = 1.0
    trains: tuple[str, ...] = ("weights", "scales")
    inputs: str = ""
    cache: str = ""
    rate: float = 5e-4
    scale_rate: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.05
    shape: Shape = "cosine"
    cooldown: float = 0.2
    ema: float = 0.0
    prox: Prox = ""
    prox_span: tuple[float, float] = (0.0, 0.9)
    vocab_chunk: int = 0

    def __post_init__(self) -> None:
        """All that an arm alone can be wrong in, for what comes before its first step may be expensive."""

        def check(ok: bool, message: str) -> None:
            if not ok:
                raise UserError(f"arm {self.name!r}: {message}")

        def known(key: str, value: str, words: Sequence[str]) -> None:
            near = difflib.get_close_matches(value, [w for w in words if w], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            check(value in words, f"{key} must be {', '.join(w or 'empty' for w in words)}, got {value!r}{hint}")

        known("scales", self.scales, SCALES)
        known("shape", self.shape, get_args(Shape))
        known("inputs", self.inputs, (*get_args(Kind), ""))
        known("prox", self.prox, get_args(Prox))
        for part in self.trains:
            known("each of trains", part, ("weights", "scales"))
        check(self.rate > 0, f"rate must be positive, got {self.rate}")
        check(self.clip > 0, f"clip must be positive, got {self.clip}")
        check(self.temperature > 0, f"temperature must be positive, got {self.temperature}")
        for key in ("scale_rate", "weight_decay", "refresh_every", "vocab_chunk"):
            check(getattr(self, key) >= 0, f"{key} must not be negative, got {getattr(self, key)}")
        check(0 <= self.warmup < 1, f"warmup is a share of the steps, from 0 to below 1; got {self.warmup}")
        if self.shape == "cooldown":
            fits = 0 < self.cooldown <= 1 - self.warmup
            check(fits, f"cooldown is a share of the steps that fits behind the warmup, got {self.cooldown}")
        check(0 <= self.ema < 1, f"ema is a decay from 0 to below 1, got {self.ema}")
        if self.refresh_every:
            check(self.scales == "frozen", f"refresh_every is for frozen scales, and these are {self.scales}")
        if self.init:
            recipe(self.init)
            check(bool(self.format), f"init {self.init!r} rounds to a format; name one")
            kept = "refit scales would not keep a recipe's grid; take frozen or learned ones, or no init"
            check(self.scales != "refit", kept)
        if self.prox:
            check(bool(self.format), "prox draws weights to a format; name one")
            plain = (self.scales, self.rule, self.estimator, self.ema) == ("refit", "own", "", 0)
            check(plain, "prox goes with refit scales of the format's own rule, without an estimator and without ema")
            check("weights" in self.trains, "prox draws weights that train; add weights to `trains`")
            start, end = self.prox_span
            check(0 <= start < end <= 1, f"prox_span is two rising shares of the steps, got {start} and {end}")
        own_scales = bool(self.format) and self.scales in ("learned", "decoupled")
        moves = "weights" in self.trains or ("scales" in self.trains and own_scales)
        check(moves, f"nothing trains; `trains` is {self.trains} and the scales are {self.scales}")
        kind, _, per = self.rule.partition("/")
        known("rule", kind, KINDS)
        known("what shares a scale of the rule", per or "group", get_args(Per))
        check_scales(self.scales, self.scale_rule)
        parse_terms(self.loss)
        if self.estimator:
            estimator(self.estimator)
        if self.cache:
            quantized_cache(self.cache)
        if self.format and not self._mixes:
            self._formats()
        if self.rules:
            Plan.from_dict({"rules": dict(self.rules)}, f"arm {self.name}")

    @property
    def scale_rule(self) -> ScaleRule:
        """`rule`, read."""
        kind, _, per = self.rule.partition("/")
        return ScaleRule(kind, per or "group")  # type: ignore[arg-type]

    @property
    def _mixes(self) -> bool:
        return self.format.upper() in FILE_TYPES and self.format not in format_names()

    def _formats(self) -> Plan:
        return Plan.from_dict({"rules": {"layers_*": self.format, "*": self.outside}}, f"arm {self.name}")

    def plan(self, config: DecoderConfig) -> Plan:
        """Which weight gets which format."""
        plan = plan_named(self.format, config) if self._mixes else self._formats()
        return plan.with_rules([Rule(pattern, fmt) for pattern, fmt in self.rules])


def quantizers_of_arm(arm: Arm, config: DecoderConfig) -> dict[str, Quantizer]:
    """{path: Quantizer} of an arm; {} for the float model. Its rule is for the weights of the blocks."""
    if not arm.format:
        return {}
    how = estimator(arm.estimator) if arm.estimator else None
    made = weights.quantizers_of(shapes_of(config), arm.plan(config), scales=arm.scales, estimator=how)
    return {p: dataclasses.replace(q, rule=arm.scale_rule) if p.startswith("layers_") else q for p, q in made.items()}


@lru_cache(maxsize=64)
def shapes_of(config: DecoderConfig) -> Any:
    """The params tree of a decoder, as shapes."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
