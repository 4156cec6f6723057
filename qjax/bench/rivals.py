"""Products with packed weights of other libraries, for the same table: a rival is a record, its library imported late.

    torch    (q - 8) s + z of four bits, groups of 128: its int4 product for CPUs, what torchao runs there

A GPU's rivals (Marlin, Triton) have no record yet; llama.cpp's products have no entry of their own in its bindings, and
are timed in whole texts (experiments/llamacpp_speed.py).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qjax.tensor import QTensor
from qjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Rival:
    """Another library's product.

    Attributes:
      name: of its kernel, in the table.
      format: of weights that it reads without loss.
      unfit: the platform -> why it does not run there; "" where it does.
      inputs: (x [m, n], dtype) -> x as it takes it.
      packed: (q, copies, dtype) -> so many weights as it has them lie, and bytes of one.
      product: (x, one of them) -> y [m, out].
      array: y -> f32.
    """

    name: str
    format: str
    unfit: Callable[[str], str]
    inputs: Callable[[Array, str], Any]
    packed: Callable[[QTensor, int, str], tuple[Sequence[Any], int]]
    product: Callable[[Any, Any], Any]
    array: Callable[[Any], np.ndarray]


_GROUP = 128


def _torch_unfit(platform: str) -> str:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    return "" if platform == "cpu" else f"its product here is one for CPUs, not for {platform}"


def _torch_inputs(x: Array, dtype: str) -> Any:
    import torch

    return torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, dtype))


def _torch_packed(q: QTensor, copies: int, dtype: str) -> tuple[Sequence[Any], int]:
    import torch

    scales, codes = q.format.unpack(q.leaves)
    s, m = (np.asarray(a) for a in q.format.columns(scales, codes.shape))
    both = np.stack([s.T, (m + 8 * s).T], axis=-1)  # [groups, out, 2]
    made = []
    for k in range(copies):
        rolled = torch.from_numpy(np.roll(np.asarray(codes), k, axis=0).astype(np.int32))
        numbers = torch.from_numpy(np.ascontiguousarray(np.roll(both, k, axis=1))).to(getattr(torch, dtype))
        made.append((torch.ops.aten._convert_weight_to_int4pack_for_cpu(rolled, 1), numbers))
    return made, sum(t.numel() * t.element_size() for t in made[0])


def _torch_product(x: Any, packed: Any) -> Any:
    import torch

    codes, numbers = packed
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, _GROUP, numbers)


RIVALS = (
    Rival(
        "torch int4pack", f"uint4_g{_GROUP}_m_f32", _torch_unfit, _torch_inputs, _torch_packed, _torch_product,
        lambda y: y.float().numpy(),
    ),
)  # fmt: skip
