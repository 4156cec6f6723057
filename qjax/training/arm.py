"""One way to train a model through its quantization, as a config writes it; experiments compare arms.

    arm = Arm("q2", format="int2_g64_mid_mse", scales="learned", loss="0.5*ce + 0.5*fkl", rate=5e-4)
    quantizers_of_arm(arm, config)      {path: Quantizer}

`finetune` runs it.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats import format_names
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.plan import FILE_TYPES, Plan, Rule
from qjax.plan.named import plan_named
from qjax.training import weights
from qjax.training.estimators import estimator
from qjax.training.objectives import parse_terms
from qjax.training.quantizer import Quantizer, ScaleKind
from qjax.training.scale_rules import ScaleRule


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
    trains: tuple[str, ...] = ("weights", "scales")
    inputs: str = ""
    cache: str = ""
    rate: float = 5e-4
    scale_rate: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.05
    shape: Literal["cosine", "constant", "cooldown"] = "cosine"
    cooldown: float = 0.2
    ema: float = 0.0
    prox: Literal["", "parq", "relax"] = ""
    prox_span: tuple[float, float] = (0.0, 0.9)
    vocab_chunk: int = 0

    def __post_init__(self) -> None:
        def check(ok: bool, message: str) -> None:
            if not ok:
                raise UserError(f"arm {self.name!r}: {message}")

        check(self.rate > 0, f"rate must be positive, got {self.rate}")
        check(self.scale_rate >= 0 and self.weight_decay >= 0, "scale_rate and weight_decay must not be negative")
        check(self.clip > 0, f"clip must be positive, got {self.clip}")
        check(0 <= self.warmup < 1, f"warmup is a share of the steps, from 0 to below 1; got {self.warmup}")
        if self.shape == "cooldown":
            fits = 0 < self.cooldown <= 1 - self.warmup
            check(fits, f"cooldown is a share of the steps that fits behind the warmup, got {self.cooldown}")
        check(0 <= self.ema < 1, f"ema is a decay from 0 to below 1, got {self.ema}")
        kinds = ("int8", "int4", "e4m3", "e5m2")
        check(self.inputs in ("", *kinds), f"inputs must be {', '.join(kinds)} or empty, got {self.inputs!r}")
        for part in self.trains:
            check(part in ("weights", "scales"), f"trains names weights and scales, not {part!r}")
        check(self.vocab_chunk >= 0, f"vocab_chunk must not be negative, got {self.vocab_chunk}")
        check(self.prox in ("", "parq", "relax"), f"prox must be parq, relax or empty, got {self.prox!r}")
        if self.prox:
            check(bool(self.format), "prox draws weights to a format; name one")
            plain = (self.scales, self.rule, self.estimator, self.ema) == ("refit", "own", "", 0)
            check(plain, "prox goes with refit scales of the format's own rule, without an estimator and without ema")
            check("weights" in self.trains, "prox draws weights that train; add weights to `trains`")
            start, end = self.prox_span
            check(0 <= start < end <= 1, f"prox_span is two rising shares of the steps, got {start} and {end}")
        parse_terms(self.loss)
        if self.estimator:
            estimator(self.estimator)

    def plan(self, config: DecoderConfig) -> Plan:
        """Which weight gets which format."""
        if self.format.upper() in FILE_TYPES and self.format not in format_names():
            plan = plan_named(self.format, config)
        else:
            plan = Plan.from_dict({"rules": {"layers_*": self.format, "*": self.outside}}, f"arm {self.name}")
        return plan.with_rules([Rule(pattern, fmt) for pattern, fmt in self.rules])


def quantizers_of_arm(arm: Arm, config: DecoderConfig) -> dict[str, Quantizer]:
    """{path: Quantizer} of an arm; {} for the float model. Its rule is for the weights of the blocks."""
    if not arm.format:
        return {}
    how = estimator(arm.estimator) if arm.estimator else None
    made = weights.quantizers_of(shapes_of(config), arm.plan(config), scales=arm.scales, estimator=how)
    kind, _, per = arm.rule.partition("/")
    rule = ScaleRule(kind, per or "group")  # type: ignore[arg-type]
    return {p: dataclasses.replace(q, rule=rule) if p.startswith("layers_") else q for p, q in made.items()}


@lru_cache(maxsize=64)
def shapes_of(config: DecoderConfig) -> Any:
    """The params tree of a decoder, as shapes."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
