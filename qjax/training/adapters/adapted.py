"""Adapters as a way to train: what they stand beside, what the forward runs on, and the model without them.

method      base                          forward                              export
lora        float                         W + scale A B                        the sum
qlora       nearest in `format`           W_hat + scale A B                    requantized: rounded again
loftq       LoftQ's Q, its A and B        W_hat + scale A B                    requantized
qalora      nearest, float zeros          adapter constant inside a group      exact: into the zeros
loraqat     float                         fake_quant(W + scale A B)            exact: is the forward
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jax import lax

from qjax.models.model import Running
from qjax.pipeline.memory import quantize_params
from qjax.plan import Plan
from qjax.training.adapters.loftq import loftq_params
from qjax.training.adapters.lora import apply_adapted, init_adapters, lora_weight, map_adapted
from qjax.training.adapters.merging import merge_fake_quantized, merge_requantized
from qjax.training.adapters.qalora import init_pooled, merge_zeros, pooled_weight
from qjax.training.grid.fake_quant import fake_quant
from qjax.training.grid.quantizer import Quantizer
from qjax.typing import Array

Method = Literal["lora", "qlora", "loftq", "qalora", "loraqat"]


@dataclasses.dataclass(frozen=True)
class Beside:
    """A function of ({"base", "adapters"}, *inputs) from one of params; equal where that is."""

    apply: Callable[..., Any]

    def __call__(self, w: Any, *inputs: Any) -> Any:
        return apply_adapted(self.apply, w["base"], w["adapters"], *inputs)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """One method on one format.

    Attributes:
      method: see the module's docstring.
      format: of the base, or of the forward.
      rank, alpha: of the adapters, see `init_adapters`.
      rounds: of LoftQ.
    """

    method: Method
    format: str = "NF4_dq"
    rank: int = 16
    alpha: float = 16.0
    rounds: int = 5

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Of weights that train through their quantization: none."""
        return {}

    @property
    def exact(self) -> bool:
        """Whether what is exported holds the values that training ran on."""
        return self.method in ("qalora", "loraqat")

    def start(self, params: Any, key: Array) -> tuple[dict[str, Any], dict[str, Any]]:
        """What trains and the constants, for `init_state`: {"adapters": ...} and {"weights": the frozen base}."""
        plan = Plan.from_dict({"rules": {"layers_*": self.format, "*": "keep"}})
        if self.method == "loftq":
            base, adapters = loftq_params(params, plan, rank=self.rank, rounds=self.rounds)
            return {"adapters": adapters}, {"weights": base}
        base = params if self.method in ("lora", "loraqat") else quantize_params(params, plan)[0]
        init = init_pooled if self.method == "qalora" else init_adapters
        return {"adapters": init(base, self.rank, self.alpha, key=key)}, {"weights": base}

    @property
    def semantics(self) -> str:
        """What became of the adapters in what is exported: "sum", or one of `merging.Semantics`."""
        return {"lora": "sum", "qalora": "exact-zeros", "loraqat": "fake-quantized"}.get(self.method, "requantized")

    def forward(self, apply: Any) -> Any:
        """A model of what `__call__` returns, from one of params."""
        return Running(apply) if self.exact else Beside(apply)

    def __call__(self, params: Any, constants: Any) -> Any:
        """What the forward runs on."""
        base, adapters = constants["weights"], params["adapters"]
        if self.method == "qalora":
            return map_adapted(pooled_weight, lax.stop_gradient(base), adapters)
        if self.method == "loraqat":
            return map_adapted(lambda _, w, a: fake_quant(lora_weight(w, a), self.format, axis=-2), base, adapters)
        return {"base": base, "adapters": adapters}

    def packed(self, params: Any, constants: Any) -> Any:
        """The tree that is exported."""
        base, adapters = constants["weights"], params["adapters"]
        if self.method == "qalora":
            return merge_zeros(base, adapters).params
        if self.method == "loraqat":
            return merge_fake_quantized(base, adapters, self.format).params
        return merge_requantized(base, adapters).params
