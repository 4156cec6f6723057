"""llama.cpp's importance matrices: how strongly each input of a weight is driven, from llama-imatrix or for it.

    importance[name][i] = mean over tokens of x_i^2,   x the input of the weight `name`

Two forms, both little-endian; `read_imatrix` knows them apart by their first bytes.

* GGUF, with general.type = "imatrix": per weight `NAME.in_sum2` f32[in], the sums of x^2, and `NAME.counts` f32[1], the
  tokens; beside them the names of the texts, the number of chunks and the tokens a chunk. Of a stack of experts
  f32[experts, in] and f32[experts, 1].
* `.dat`, what llama.cpp wrote before: n:i32, n times (length:i32 name calls:i32 in:i32 mean * calls:f32[in]), then
  optionally chunks:i32 length:i32 text. A call is a chunk; how many tokens it had is not in the file, nor how many
  experts share an entry.

An expert that saw no token has ones for its importance, which is none, as llama-quantize has it.

Sources: llama.cpp, tools/imatrix/imatrix.cpp (`save_imatrix`, `save_imatrix_legacy`), and what tools/quantize makes of
both.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.io.atomic import atomic_file
from qjax.io.gguf_read import GGUFFile, read_gguf
from qjax.io.gguf_types import MAGIC, MAX_NAME
from qjax.io.gguf_write import TensorInfo, write_gguf

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
USUAL_CHUNK = 512  # tokens a chunk of llama-imatrix unless told otherwise; assumed for .dat files
_MIN_ENTRY = 4 + 1 + 4 + 4 + 4  # length, name, calls, number of values, one value


@dataclasses.dataclass(frozen=True, eq=False)
class Imatrix:
    """The importance of the inputs of a model's weights.

    Attributes:
      values: GGUF name of a weight -> f32[in], its mean squared inputs; of a stack f32[experts, in].
      counts: the same names -> how many tokens the mean is over; of a stack i64[experts].
      datasets: names of the texts.
      chunk_size: tokens a chunk.

    Raises:
      UserError: no entries, names that differ, an empty or many-dimensional entry, a value that is NaN, infinite or
        negative, no tokens.
    """

    values: Mapping[str, np.ndarray]
    counts: Mapping[str, Any]
    datasets: tuple[str, ...] = ()
    chunk_size: int = USUAL_CHUNK

    def __post_init__(self) -> None:
        if odd := self.values.keys() ^ self.counts.keys():
            raise UserError(f"entry {min(odd)!r} of the importance matrix needs both values and a count")
        if not self.values:
            raise UserError("an importance matrix without entries")
        if self.chunk_size < 1:
            raise UserError(f"an importance matrix with chunks of {self.chunk_size} tokens; expected at least 1")
        for name, x in self.values.items():
            if x.ndim not in (1, 2) or not x.size or np.shape(self.counts[name]) != x.shape[:-1]:
                raise UserError(
                    f"entry {name!r} of the importance matrix has shape {list(x.shape)} and counts "
                    f"{list(np.shape(self.counts[name]))}; expected [in] and a number, or [experts, in] and [experts]"
                )
            bad = x[~(np.isfinite(x) & (x >= 0))]
            if bad.size:
                raise UserError(f"entry {name!r} of the importance matrix holds {bad[0]}, which is no mean of squares")
            if np.max(self.counts[name]) < 1:
                raise UserError(f"entry {name!r} of the importance matrix saw no tokens; calibrate on more text")

    @property
    def chunks(self) -> int:
        """Whole chunks that were read."""
        return int(max(np.max(count) for count in self.counts.values())) // self.chunk_size


def read_imatrix(path: str | Path) -> Imatrix:
    """Read an importance matrix of either form.

    Args:
      path: what llama-imatrix or `write_imatrix` wrote. A `.dat` file counts chunks, not tokens: its chunks are taken
        to have 512 tokens.

    Raises:
      UserError: no importance matrix, truncated, or one that `Imatrix` refuses; names the file and the entry.
    """
    path = Path(path)
    try:
        with open(path, "rb") as f:
            is_gguf = f.read(4) == MAGIC
        if is_gguf:
            return _from_gguf(read_gguf(path))
        return _from_dat(path.read_bytes())
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    except UserError as e:
        raise e if str(path) in str(e) else UserError(f"{path}: {e}") from None


def said_of(path: str | Path, imatrix: Imatrix) -> dict[str, Any]:
    """The metadata of a GGUF file that was quantized with an importance matrix, as llama-quantize writes them.

    Args:
      path: as the user gave it.
    """
    return {
        "quantize.imatrix.file": str(path),
        **({"quantize.imatrix.dataset": imatrix.datasets[0]} if imatrix.datasets else {}),
        "quantize.imatrix.entries_count": np.uint32(len(imatrix.values)),
        "quantize.imatrix.chunks_count": np.uint32(imatrix.chunks),
    }


def write_imatrix(path: str | Path, imatrix: Imatrix, legacy: bool = False) -> None:
    """Write an importance matrix, atomically, entries sorted by name as llama-imatrix does.

    Args:
      path: the final name.
      imatrix: what to write.
      legacy: the `.dat` form, for old programs: counts are rounded up to whole chunks, and only the last data set's
        name is kept.

    Raises:
      UserError: a name too long for GGUF, a disk that will not take it.
    """
    names = sorted(imatrix.values)
    if legacy:
        with atomic_file(path) as f:
            f.writelines(_dat_parts(imatrix, names))
        return
    metadata = {
        "general.type": "imatrix",
        DATASETS: list(imatrix.datasets),
        CHUNKS: imatrix.chunks,
        CHUNK_SIZE: imatrix.chunk_size,
    }
    counts = {name: np.asarray(imatrix.counts[name], "<f4")[..., None] for name in names}
    infos = [
        info
        for name in names
        for info in (
            TensorInfo(name + SUMS, imatrix.values[name].shape, "F32"),
            TensorInfo(name + COUNTS, counts[name].shape, "F32"),
        )
    ]
    arrays = (array for name in names for array in (_scaled(imatrix.values[name], imatrix.counts[name]), counts[name]))
    write_gguf(path, metadata, infos, arrays)


def check_imatrix(imatrix: Imatrix | Mapping[str, np.ndarray], tensors: Mapping[str, Sequence[int]]) -> None:
    """Refuse the importance matrix of another model. Weights without an entry are fine: they are rounded without.

    Args:
      imatrix: an Imatrix, or its values alone.
      tensors: GGUF name -> shape, the contracted axis last, of every tensor of the model.

    Raises:
      UserError: an entry for a tensor that is not there, or of another length than the tensor's rows.
    """
    values = imatrix.values if isinstance(imatrix, Imatrix) else imatrix
    for name, x in values.items():
        if name not in tensors:
            raise UserError(f"an importance matrix of another model: it has {name!r}, the model has no such tensor")
        *stack, _, columns = tensors[name] if len(tensors[name]) > 1 else (1, *tensors[name])
        if x.size != math.prod(stack) * columns:
            raise UserError(
                f"an importance matrix of another model: its entry {name!r} has {x.size} values, "
                f"the model's tensor{''.join(f' {n} experts with' for n in stack)} rows of {columns} weights"
            )


def _scaled(mean: np.ndarray, count: Any) -> np.ndarray:
    return (mean.astype(np.float64) * np.asarray(count)[..., None]).astype("<f4")


def _mean(sums: np.ndarray, count: Any) -> np.ndarray:
    """The means over a count of tokens, or of each row over its own; ones where an expert saw none."""
    n = np.asarray(count, np.float32)[..., None]
    means = sums.astype(np.float32) / np.maximum(n, np.float32(1))
    return np.where(n > 0, means, np.float32(1)) if n.ndim > 1 else means  # a weight's 0 is refused by Imatrix


def _from_gguf(file: GGUFFile) -> Imatrix:
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise UserError(f"not an importance matrix: a GGUF file whose general.type is {kind!r}, not 'imatrix'")
    datasets, chunk_size = file.metadata.get(DATASETS, []), file.metadata.get(CHUNK_SIZE)
    if not isinstance(datasets, list) or not all(isinstance(d, str) for d in datasets):
        raise UserError(f"{DATASETS} is not a list of texts' names")
    if type(chunk_size) is not int:
        raise UserError(f"{CHUNK_SIZE} is {chunk_size!r}, not a number of tokens")
    values: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for tensor in file.tensors:
        name, suffix = _split(tensor)
        if not suffix:
            continue  # newer llama.cpp adds sums and statistics that quantizing does not need
        if file.entry(tensor).type != "F32":
            raise UserError(f"tensor {tensor!r} has type {file.entry(tensor).type}; expected F32")
        data = file.array(tensor)
        if suffix == SUMS:
            values[name] = data
            continue
        data = data.reshape(-1)
        if not ((data >= 0) & (data < 2.0**63)).all():
            raise UserError(f"entry {name!r} has the count {data[~((data >= 0) & (data < 2.0**63))][0]}")
        counts[name] = round(float(data[0])) if data.size == 1 else np.rint(data).astype(np.int64)
    for name in values.keys() & counts.keys():
        values[name] = _by_expert(name, values[name], counts[name])
    means = {name: _mean(x, counts.get(name, 0)) for name, x in values.items()}
    return Imatrix(means, counts, tuple(datasets), chunk_size)


def _by_expert(name: str, sums: np.ndarray, counts: Any) -> np.ndarray:
    """Sums as f32[in], or as f32[experts, in] where there is a count for each expert."""
    experts = np.size(counts)
    if sums.size % experts or (sums.ndim > 1 and len(sums) != experts):
        raise UserError(f"entry {name!r} has sums of shape {list(sums.shape)} for {experts} counts")
    return sums.reshape(-1) if experts == 1 else sums.reshape(experts, -1)


def _split(tensor: str) -> tuple[str, str]:
    for suffix in (SUMS, COUNTS):
        if tensor.endswith(suffix):
            return tensor.removesuffix(suffix), suffix
    return tensor, ""


def _from_dat(raw: bytes) -> Imatrix:
    n = struct.unpack_from("<i", raw)[0] if len(raw) >= 4 else 0
    if not 1 <= n <= len(raw) // _MIN_ENTRY:
        raise UserError("not an importance matrix: neither a GGUF file nor llama.cpp's older .dat form")
    at = 4

    def take(size: int, what: str) -> bytes:
        nonlocal at
        if size < 0 or size > len(raw) - at:
            raise UserError(f"truncated, or no importance matrix: {what} needs {size} bytes at {at} of {len(raw)}")
        at += size
        return raw[at - size : at]

    def number(what: str) -> int:
        return struct.unpack("<i", take(4, what))[0]

    def text(what: str, longest: int) -> str:
        size = number(f"the length of {what}")
        if not 0 <= size <= longest:
            raise UserError(f"no importance matrix: {what} has {size} bytes; expected at most {longest}")
        try:
            return take(size, what).decode()
        except UnicodeDecodeError:
            raise UserError(f"no importance matrix: {what} is not UTF-8") from None

    values: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for i in range(n):
        name = text(f"the name of entry {i}", MAX_NAME - 1)
        if name in values:
            raise UserError(f"entry {name!r} appears twice")
        calls, size = number(f"the count of entry {name!r}"), number(f"the length of entry {name!r}")
        values[name] = _mean(np.frombuffer(take(4 * size, f"entry {name!r}"), "<f4"), calls)
        counts[name] = calls * USUAL_CHUNK
    datasets: tuple[str, ...] = ()
    if at < len(raw):  # the number of chunks, then the text's name; the oldest files end before them
        number("the number of chunks")
        datasets = tuple(filter(None, [text("the data set's name", len(raw))])) if at < len(raw) else ()
    return Imatrix(values, counts, datasets)


def _dat_parts(imatrix: Imatrix, names: Sequence[str]) -> Iterator[bytes]:
    yield struct.pack("<i", len(names))
    for name in names:
        calls = -(-int(np.max(imatrix.counts[name])) // imatrix.chunk_size)
        x = imatrix.values[name]
        yield _text(name) + struct.pack("<ii", calls, x.size)
        yield _scaled(x.reshape(-1), calls).tobytes()
    yield struct.pack("<i", imatrix.chunks) + _text(imatrix.datasets[-1] if imatrix.datasets else "")


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<i", len(raw)) + raw
