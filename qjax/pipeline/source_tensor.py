"""One tensor of a model's files, mapped into memory when it is asked for and unmapped when its array is dropped.

So the memory in use is that of the tensors being worked on, not of the file.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from qjax.errors import UserError
from qjax.io.gguf_types import DENSE
from qjax.io.rope_rows import to_halves, to_pairs
from qjax.io.space import aligned
from qjax.models.families import WeightName
from qjax.plan import Weight
from qjax.tensor import QTensor, dequantize, from_bytes

_ROWS = 1 << 22  # weights unpacked at a time


@dataclasses.dataclass(frozen=True, eq=False)
class SourceTensor:
    """One tensor of a model.

    Attributes:
      weight: its names and its shape (out, in).
      type: the ggml type it has, or the format's name.
      file, offset, nbytes: where it lies; or
      values: the tensor itself, where no file holds it in this form; or
      parts: the matrices of a stack, which lie apart; or
      made: (first, count) -> its rows from the first on, of the file's values in another form; or
      packed: the weight, quantized as some other library's checkpoint has it, rows (out, in).
      rope_heads: heads whose rows are permuted on the way into a GGUF file (see `WeightName`).
      add: what is added to every value on that way.
      decay: every value becomes -exp of it on that way.
    """

    weight: Weight
    type: str
    file: Path = Path()
    offset: int = 0
    nbytes: int = 0
    values: np.ndarray | None = None
    parts: tuple[SourceTensor, ...] = ()
    made: Callable[[int, int], np.ndarray] | None = None
    packed: Callable[[], QTensor] | None = None
    rope_heads: int | None = None
    add: float = 0.0
    decay: bool = False

    @property
    def name(self) -> str:
        return self.weight.gguf or self.weight.path

    @property
    def is_changed(self) -> bool:
        """Whether its bytes in a GGUF file differ from those here."""
        return self.rope_heads is not None or self.add != 0.0 or self.decay

    @property
    def pieces(self) -> tuple[SourceTensor, ...]:
        """What lies in one place each: its parts, or itself."""
        return self.parts or (self,)

    def raw(self, ahead: bool = True) -> np.ndarray:
        """Its bytes: u8[nbytes], mapped. A hint asks the disk to have them ready, unless they are not to be read
        `ahead`."""
        if self.parts:
            return np.concatenate([part.raw(ahead) for part in self.parts])
        if self.packed is not None:
            raise UserError(f"{self.file}: tensor {self.name!r} is {self.type}, which no GGUF file holds as it is")
        if self.values is not None:
            return self.values.reshape(-1).view(np.uint8)
        if self.made is not None:
            return np.ascontiguousarray(self.made(0, self.weight.shape[0])).reshape(-1).view(np.uint8)
        with open(self.file, "rb") as f:
            if os.fstat(f.fileno()).st_size < self.offset + self.nbytes:  # touching the rest would kill the process
                raise UserError(f"{self.file}: tensor {self.name!r} ends beyond the file's end; the file is truncated")
            if self.nbytes == 0:
                return np.empty(0, np.uint8)
            if ahead and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(f.fileno(), self.offset, self.nbytes, os.POSIX_FADV_WILLNEED)
            skip = self.offset % mmap.ALLOCATIONGRANULARITY
            mapped = mmap.mmap(f.fileno(), skip + self.nbytes, access=mmap.ACCESS_READ, offset=self.offset - skip)
        return np.frombuffer(mapped, np.uint8)[skip:]

    def cut(self, at: int, count: int) -> SourceTensor:
        """Some of its rows in the file, as a tensor of their own."""
        span = self.nbytes // self.weight.shape[0]
        weight = dataclasses.replace(self.weight, shape=(count, *self.weight.shape[1:]))
        values = None if self.values is None else self.values[at : at + count]
        made, place = self.made, self.offset + at * span
        later = None if made is None else lambda first, count: made(at + first, count)
        return dataclasses.replace(self, weight=weight, offset=place, nbytes=count * span, values=values, made=later)

    def rows(self, which: np.ndarray) -> np.ndarray:
        """f32[n, in]: some rows of the values in the file; the others are not read."""
        if self.packed is not None:
            q = self._of_floats(self.packed())
            if q.format.rows != 1 or q.applied:
                return np.asarray(dequantize(q))[which]
            return np.asarray(dequantize(jax.tree.map(lambda leaf: np.asarray(leaf)[which], q)))
        first, last = int(np.min(which, initial=self.weight.shape[0] - 1)), int(np.max(which, initial=0))
        part = self.cut(first, last + 1 - first)
        raw = part.raw(ahead=part.weight.shape[0] <= len(which)).reshape(part.weight.shape[0], -1)
        raw = raw[np.asarray(which) - first]
        if self.type in DENSE:
            return raw.view(DENSE[self.type]).astype(np.float32)
        return np.asarray(dequantize(from_bytes(self.type, raw.reshape(-1), (len(raw), self.weight.shape[1]))))

    def read(self) -> np.ndarray:
        """Its values (out, in) as a GGUF file holds them: a view of the mapped file where nothing has to be done."""
        shape = self.weight.shape
        if self.parts:
            return np.stack([part.read() for part in self.parts])
        if self.packed is not None:
            w = np.asarray(dequantize(self._of_floats(self.packed())))
        elif self.type in DENSE:
            raw, dtype = self.raw(), DENSE[self.type]
            raw = raw.copy() if self.values is None and self.made is None and self.offset % dtype.itemsize else raw
            w = raw.view(dtype).reshape(shape)
        else:
            w = self._unpacked()
        if self.rope_heads is not None:
            w = to_pairs(w, self.rope_heads)
        w = (w.astype(np.float32) + np.float32(self.add)) if self.add else w
        return -np.exp(w.astype(np.float32)) if self.decay else w

    def qtensor(self, w: WeightName, is_gguf: bool) -> QTensor | None:
        """Its packed rows (out, in), in the order of Hugging Face's folders; None where they are floats.

        Args:
          w: the weight.
          is_gguf: whether the file holds them as GGUF does.
        """
        if self.type in DENSE:
            return None
        if self.parts:
            return jax.tree.map(lambda *leaves: np.stack(leaves), *(part.qtensor(w, is_gguf) for part in self.parts))
        if self.packed is not None:
            return self.packed()
        q = from_bytes(self.type, self.raw(), self.weight.shape)
        if w.rope_heads is None or not is_gguf:
            return q
        return dataclasses.replace(q, leaves={"blocks": to_halves(np.asarray(q.leaves["blocks"]), w.rope_heads)})

    def _of_floats(self, q: QTensor) -> QTensor:
        """The weight, if floats can stand for it."""
        if q.rounds_inputs:
            raise UserError(
                f"{self.file}: {self.name!r} rounds its inputs too, which weights as floats cannot say; run it with "
                "--packed, or as qjax.load gives it"
            )
        return q

    def _unpacked(self) -> np.ndarray:
        shape = self.weight.shape
        out = np.empty(shape, np.float32)
        flat = out.reshape(-1, shape[-1])
        raw = self.raw().reshape(len(flat), -1)
        step = max(1, _ROWS // shape[-1])
        for at in range(0, len(flat), step):
            q = from_bytes(self.type, raw[at : at + step].reshape(-1), flat[at : at + step].shape)
            flat[at : at + step] = np.asarray(dequantize(q))
        return out

    def flax_leaf(self, w: WeightName, is_gguf: bool) -> np.ndarray:
        """Its values as the decoder holds them: f32, kernels (in, out), rotary rows in halves, as nothing was added.

        Args:
          w: the weight.
          is_gguf: whether the file holds them as GGUF does.
        """
        out = aligned(w.shape)
        flat = w.turned(out)  # in the file's order of axes
        plain = self if is_gguf else dataclasses.replace(self, rope_heads=None, add=0.0, decay=False)
        whole = (
            bool(self.parts)
            or self.packed is not None
            or flat.shape != tuple(self.weight.shape)
            or (w.rope_heads is not None and is_gguf)
        )
        if whole:
            rows = plain.read()
            rows = rows if w.rope_heads is None or not is_gguf else to_halves(rows, w.rope_heads)
            flat[...] = rows.reshape(flat.shape)
        else:
            count, step = len(flat), max(1, _ROWS * len(flat) // max(1, flat.size))
            for at in range(0, count, step):  # so that few of the file's pages are mapped at a time
                flat[at : at + step] = plain.cut(at, min(step, count - at)).read()
        if w.offset and is_gguf:
            flat -= np.float32(w.offset)
        if w.decay and is_gguf:
            np.log(-flat, out=flat)
        return out
