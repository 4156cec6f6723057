"""A decoder as an ONNX graph: input_ids i64[batch, length] -> logits f32[batch, length, vocab], without a cache.

    x + o(attention(rope(q n), rope(k n), v n)),  n = rms(x)        x + down(silu(gate n) * up n)

Llama, and what differs from it in nothing but biases of q, k and v (Qwen2) and norms of q and k (Qwen3). Packed weights
are MatMulNBits nodes of ONNX Runtime, told to compute in float32. Heads of a key are an axis of their own, so keys and
values are not repeated: scores [batch, kv_heads, heads / kv_heads, length, length].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.models.config import DecoderConfig
from qjax.models.families import weight_names
from qjax.models.rotary import rope_frequencies

_OPSET = 18
_TOLD = ("vocab", "dim", "hidden", "layers", "heads", "kv_heads", "head_dim", "context", "norm_eps", "rope_theta",
         "rope_scaling", "tied", "family", "qkv_bias", "qk_norm")  # fmt: skip


def check_graph(config: DecoderConfig) -> None:
    """Raise UserError where a decoder does what no graph here does."""
    plain = DecoderConfig(**{name: getattr(config, name) for name in _TOLD})
    odd = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(plain, f.name)]
    if config.rope_scaling is not None and config.rope_scaling.kind not in ("linear", "llama3", "table"):
        odd.append("rope_scaling")
    if odd:
        raise UserError(
            f"there is no ONNX graph of a {config.family} model with {odd[0]}: Llama, Qwen2 and Qwen3 have one; write "
            "another container"
        )


def graph_of(onnx: Any, config: DecoderConfig, tensors: Mapping[str, Any]) -> Any:
    """The ModelProto.

    Args:
      onnx: the package.
      config: of the decoder.
      tensors: its initializers by name: a Hugging Face name, or, packed, those of exports/onnx.py.
    """
    return _Builder(onnx, config, tensors).model()


class _Builder:
    """Nodes on their way; a value is the name of what a node makes."""

    def __init__(self, onnx: Any, config: DecoderConfig, tensors: Mapping[str, Any]):
        self.onnx, self.config, self.tensors = onnx, config, tensors
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.names = {"/".join(w.path): w.hf for w in weight_names(config)}

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; the name of its output, or of each."""
        made = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), made, domain=domain, **attributes))
        return made[0] if outputs == 1 else made

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """An initializer inside the file."""
        array = np.asarray(value, dtype)
        name = f"constant_{len(self.constants)}"
        self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def weight(self, path: str) -> str:
        return self.names[path]

    def linear(self, x: str, path: str) -> str:
        """x W^T, and its bias where it has one."""
        hf = self.weight(f"{path}/kernel")
        packed = hf.removesuffix(".weight")
        if (codes := self.tensors.get(f"{packed}.weight_Q")) is not None:
            out, groups, size = codes.dims
            block = self.width(path) // groups
            more = [n for n in (f"{packed}.weight_zeros",) if n in self.tensors]
            y = self.op(
                "MatMulNBits", x, f"{packed}.weight_Q", f"{packed}.weight_scales", *more,
                domain="com.microsoft", K=groups * block, N=out, bits=8 * size // block, block_size=block,
                accuracy_level=1,
            )  # fmt: skip
        else:
            y = self.op("MatMul", x, self.op("Transpose", hf, perm=[1, 0]))
        bias = f"{path}/bias"
        return self.op("Add", y, self.weight(bias)) if bias in self.names else y

    def width(self, path: str) -> int:
        """Inputs of a linear layer."""
        c = self.config
        return {"o": c.heads * c.head_dim, "down": c.hidden}.get(path.rsplit("/", 1)[-1], c.dim)

    def norm(self, x: str, path: str) -> str:
        """x / rms(x) times the gain, over the last axis."""
        mean = self.op("ReduceMean", self.op("Mul", x, x), self.constant([-1]), keepdims=1)
        root = self.op("Sqrt", self.op("Add", mean, self.constant(self.config.norm_eps, np.float32)))
        return self.op("Mul", self.op("Div", x, root), self.weight(f"{path}/scale"))

    def heads(self, x: str, of_each: int) -> str:
        """[batch, length, kv_heads of_each head_dim] -> [batch, length, kv_heads, of_each, head_dim]."""
        c = self.config
        return self.op("Reshape", x, self.constant([0, 0, c.kv_heads, of_each, c.head_dim]))

    def rotated(self, x: str, cos: str, sin: str) -> str:
        """The halves of each head turned: [..., length, head_dim]."""
        a, b = self.op("Split", x, outputs=2, axis=-1, num_outputs=2)
        first = self.op("Sub", self.op("Mul", a, cos), self.op("Mul", b, sin))
        second = self.op("Add", self.op("Mul", b, cos), self.op("Mul", a, sin))
        return self.op("Concat", first, second, axis=-1)

    def attention(self, x: str, at: str, turn: tuple[str, str], mask: str) -> str:
        c, to_front = self.config, [0, 2, 3, 1, 4]
        q, k, v = (self.heads(self.linear(x, f"{at}/{p}"), n) for p, n in
                   (("q", c.heads // c.kv_heads), ("k", 1), ("v", 1)))  # fmt: skip
        if c.qk_norm:
            q, k = self.norm(q, f"{at}/q_norm"), self.norm(k, f"{at}/k_norm")
        q, k, v = (self.op("Transpose", t, perm=to_front) for t in (q, k, v))
        q, k = self.rotated(q, *turn), self.rotated(k, *turn)
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 2, 4, 3]))
        scores = self.op("Mul", scores, self.constant(1 / math.sqrt(c.head_dim), np.float32))
        shares = self.op("Softmax", self.op("Add", scores, mask), axis=-1)
        y = self.op("Transpose", self.op("MatMul", shares, v), perm=[0, 3, 1, 2, 4])
        return self.linear(self.op("Reshape", y, self.constant([0, 0, -1])), f"{at}/o")

    def mlp(self, x: str, at: str) -> str:
        gate = self.linear(x, f"{at}/gate")
        gate = self.op("Mul", gate, self.op("Sigmoid", gate))
        return self.linear(self.op("Mul", gate, self.linear(x, f"{at}/up")), f"{at}/down")

    def model(self) -> Any:
        c, proto = self.config, self.onnx.TensorProto
        length = self.op("Shape", "input_ids", start=1, end=2)
        f = np.asarray(rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling), np.float32)
        angle = np.arange(c.context, dtype=np.float32)[:, None] * f
        tables = (self.constant(np.cos(angle), np.float32), self.constant(np.sin(angle), np.float32))
        turn = tuple(self.op("Slice", t, self.constant([0]), length, self.constant([0])) for t in tables)
        low = self.onnx.numpy_helper.from_array(np.array([-1e30], np.float32))
        square = self.op("ConstantOfShape", self.op("Concat", length, length, axis=0), value=low)
        mask = self.op("Trilu", square, self.constant(1), upper=1)
        x = self.op("Gather", self.weight("embed/embedding"), "input_ids", axis=0)
        for i in range(c.layers):
            at = f"layers_{i}"
            y = self.attention(self.norm(x, f"{at}/attn_norm"), f"{at}/attn", (turn[0], turn[1]), mask)
            x = self.op("Add", x, y)
            x = self.op("Add", x, self.mlp(self.norm(x, f"{at}/mlp_norm"), f"{at}/mlp"))
        x = self.norm(x, "final_norm")
        if c.tied:
            x = self.op("MatMul", x, self.op("Transpose", self.weight("embed/embedding"), perm=[1, 0]))
        else:
            x = self.linear(x, "head")
        self.nodes.append(self.onnx.helper.make_node("Identity", [x], ["logits"]))
        value = self.onnx.helper.make_tensor_value_info
        graph = self.onnx.helper.make_graph(
            self.nodes, "decoder",
            [value("input_ids", proto.INT64, ["batch", "length"])],
            [value("logits", proto.FLOAT, ["batch", "length", c.vocab])],
            [*self.constants.values(), *self.tensors.values()],
        )  # fmt: skip
        opsets = [self.onnx.helper.make_opsetid("", _OPSET), self.onnx.helper.make_opsetid("com.microsoft", 1)]
        return self.onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="qjax")
