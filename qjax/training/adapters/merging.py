"""From a model with adapters to one without: three merges, and what each of them costs.

W_hat + scale A B lies on no grid. What can be exported depends on what training computed with:

    requantized       q(W_hat + scale A B), rounded after training, which never saw it: lossy. QLoRA on export
    exact-zeros       scale A B is constant inside a group and joins the group's float zero: QA-LoRA, in qalora.py
    fake-quantized    training ran on q(W + scale A B) itself: what `quantize` returns is the export. LoRA-QAT

LoRA-QAT's forward is a fake-quantizer over `lora_weight`:

    fake = map_adapted(lambda path, w, m: fake_quant(lora_weight(w, m), format, axis=-2), params, adapters)
    y = apply(fake, x)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qjax.errors import UserError
from qjax.formats import format as get_format
from qjax.formats.protocol import Format
from qjax.tensor import QTensor, dequantize, is_qtensor, quantize
from qjax.training.adapters.lora import Adapter, Adapters, lora_weight, map_adapted
from qjax.typing import Array

Semantics = Literal["requantized", "exact-zeros", "fake-quantized"]


@dataclasses.dataclass(frozen=True)
class Merged:
    """A model without adapters.

    Attributes:
      params: the tree.
      semantics: how its adapters were merged.
      errors: {path: |W' - W| / |W|} in Frobenius norms, W' the merged weight and W what it was in training.
    """

    params: Any
    semantics: Semantics
    errors: dict[str, float]


def merge_requantized(params: Any, adapters: Adapters) -> Merged:
    """Add adapters to the weights and round those that were packed onto their formats again.

    `errors` compares with W_hat + scale A B: the harm that this rounding does.

    Args:
      params: dense (merged in their own type) or packed.
      adapters: trained by `apply_adapted`.

    Raises:
      UserError: a packed weight behind a reparametrization.
    """

    def merged(path: str, w: Any, adapter: Adapter) -> Any:
        if not is_qtensor(w):
            return lora_weight(w, adapter).astype(w.dtype)
        check_bare(path, w)
        return quantize(lora_weight(w, adapter), w.format, w.axis)

    return merge_each("requantized", params, adapters, merged, lambda path, w, adapter: lora_weight(w, adapter))


def merge_fake_quantized(params: Any, adapters: Adapters, format: str | Format | Mapping[str, str | Format]) -> Merged:
    """Store what a fake-quantized forward computed with: q(W + scale A B).

    `errors` compares with that forward, compiled as one program as in training: all zeros.

    Args:
      params: the base of training.
      adapters: trained under dequantize(quantize(lora_weight(w, adapter), format, axis)), straight through.
      format: of training: one for all, or {path: format}. Arrays are kernels (in, out).

    Raises:
      UserError: a weight with an adapter that `format` does not name; what `quantize` raises.
    """

    def merged(path: str, w: Any, adapter: Adapter) -> QTensor:
        return quantize(lora_weight(w, adapter), *grid(path, w))

    def trained(path: str, w: Any, adapter: Adapter) -> Array:
        return _fake(w, adapter, *grid(path, w))

    def grid(path: str, w: Any) -> tuple[Any, int]:
        named = format.get(path) if isinstance(format, Mapping) else format
        if named is None:
            raise UserError(f"{path} has an adapter, but no format is given for it")
        return get_format(named), w.axis if is_qtensor(w) else -2

    return merge_each("fake-quantized", params, adapters, merged, trained)


@partial(jax.jit, static_argnames=("format", "axis"))
def _fake(w: Any, adapter: Adapter, format: Format, axis: int) -> Array:
    return dequantize(quantize(lora_weight(w, adapter), format, axis))


def merge_each(
    semantics: Semantics,
    params: Any,
    adapters: Adapters,
    merged: Callable[[str, Any, Adapter], Any],
    trained: Callable[[str, Any, Adapter], Array],
) -> Merged:
    """Merge all weights, and measure each against what it was in training."""
    errors: dict[str, float] = {}

    def one(path: str, w: Any, adapter: Adapter) -> Any:
        new = merged(path, w, adapter)
        errors[path] = float(_distance(new, trained(path, w, adapter)))
        return new

    return Merged(map_adapted(one, params, adapters), semantics, errors)


@jax.jit
def _distance(new: Any, w: Array) -> Array:
    x = dequantize(new) if is_qtensor(new) else new.astype(jnp.float32)
    size = jnp.linalg.norm(w.reshape(-1))
    return jnp.linalg.norm((x - w).reshape(-1)) / jnp.where(size > 0, size, 1.0)


def check_bare(path: str, q: QTensor) -> None:
    """Raise UserError where codes lie behind a reparametrization."""
    if q.applied:
        raise UserError(
            f"{path}: its codes lie behind {type(q.applied[0]).__name__}, into which no adapter can be merged; keep it "
            "beside the weight, or start from a format without reparametrizations"
        )
