"""A teacher that was run once: the k most probable tokens of each position and the mass of the rest, kept in files.

    outcomes: the teacher's top k tokens, and "another token" with mass 1 - sum_{v in top k} p_v
    loss = T^2 x mean over valid tokens of sum_{k + 1 outcomes} f(log p, log q)

for any divergence f of distill.py. Merging outcomes never increases an f-divergence (data processing inequality: Cover
and Thomas, Elements of Information Theory, section 2.8), so this is a lower bound of the full loss, and equal to it at
k = v. The student is not told how to spread the rest.

Both masses of the rest are summed from their own logits, which keeps their digits at 1e-30 and at 1 - 1e-7 alike;
1 - sum p would not. A cache belongs to one temperature.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.errors import UserError
from qjax.io.atomic import atomic_dir
from qjax.training.losses.distill import FLOOR, Divergence, log_probabilities, token_mean
from qjax.typing import Array, Float, Int, Shaped

_KEYS = ("indices", "logp", "tail")
_FLOATS = ("<f2", "<f4")
_KINDS = {"indices": ("<u2", "<u4"), "logp": _FLOATS, "tail": _FLOATS}


def top_k(teacher_logits: Float[Array, "*b v"], k: int, temperature: float = 1.0) -> dict[str, Array]:
    """What the loss needs of a teacher.

    Args:
      teacher_logits: floats [*b, v].
      k: tokens to keep, at most v.

    Returns: indices i32[*b, k], most probable first; logp f32[*b, k], their log-probabilities; tail f32[*b], the
      log-probability of all others together.

    Raises:
      UserError: k is not in 1 ... v.
    """
    v = teacher_logits.shape[-1]
    if not 1 <= k <= v:
        raise UserError(f"top_k keeps 1 to {v} tokens of this vocabulary, got k = {k}")
    indices = lax.top_k(teacher_logits, k)[1].astype(jnp.int32)
    log_p = merged(teacher_logits, indices, temperature)
    return {"indices": indices, "logp": log_p[..., :k], "tail": log_p[..., k]}


def top_k_loss(
    divergence: Divergence,
    cached: Mapping[str, Array],
    student_logits: Float[Array, "*b v"],
    mask: Shaped[Array, "*b"] | None = None,
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """T^2 times the mean divergence over valid tokens between teacher and student on the k + 1 outcomes.

    Args:
      divergence: from `distill.divergence(name)`.
      cached: from `top_k` or `rows`, of the same temperature.
      student_logits: floats [*b, v].
      mask: [*b]; True (or a positive weight) where a token counts. None: all count.

    Returns: f32 scalar.
    """
    outcomes = jnp.concatenate([cached["logp"], cached["tail"][..., None]], axis=-1)
    log_p = log_probabilities(lax.stop_gradient(outcomes))  # sums to one again after 16 bits
    log_q = merged(student_logits, cached["indices"], temperature)
    return temperature**2 * token_mean(divergence(log_p, log_q).sum(axis=-1), mask)


def merged(
    logits: Float[Array, "*b v"], indices: Int[Array, "*b k"], temperature: float = 1.0
) -> Float[Array, "*b k_and_rest"]:
    """Log-probabilities of the tokens at `indices`, and of all others as one more outcome."""
    z = logits.astype(jnp.float32) / temperature
    inside = jnp.take_along_axis(z, indices, axis=-1)
    outside = jnp.put_along_axis(z, indices, FLOOR, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(outside, axis=-1, keepdims=True)
    return log_probabilities(jnp.concatenate([inside, rest], axis=-1))


def write_top_k(
    folder: str | Path, batches: Iterable[Mapping[str, Any]], sequences: int, vocab: int, dtype: Any = np.float16
) -> None:
    """Write the cache of a token set as indices.npy, logp.npy and tail.npy; the folder appears whole or not at all.

    Args:
      folder: its final name.
      batches: what `top_k` gives for logits [b, t, v], in the order of the sequences; b may vary, t and k may not.
      sequences: how many they are together.
      vocab: v; up to 65536, indices take 16 bits, else 32.
      dtype: float16 or float32, of the log-probabilities.

    Raises:
      UserError: another number of sequences, shapes that change, an index outside the vocabulary, NaN, another dtype,
        or a folder that cannot be written.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.float16, np.float32):
        raise UserError(f"log-probabilities are kept as float16 or float32, got {dtype}")
    types = {"indices": np.dtype(np.uint16 if vocab <= 1 << 16 else np.uint32), "logp": dtype, "tail": dtype}
    with atomic_dir(folder) as temporary, ExitStack() as stack:
        files = {key: stack.enter_context(open(temporary / f"{key}.npy", "wb")) for key in _KEYS}
        done, inner = 0, None
        for batch in batches:
            arrays = {key: np.asarray(batch[key]) for key in _KEYS}
            if inner is None:
                inner = {key: a.shape[1:] for key, a in arrays.items()}
                for key, file in files.items():
                    _write_header(file, types[key], (sequences, *inner[key]))
            _check(arrays, inner, vocab, done)
            for key, file in files.items():
                file.write(_cast(arrays[key], types[key]).tobytes())
            done += len(arrays["tail"])
        if done != sequences or not sequences:
            raise UserError(f"{folder}: {sequences} sequences were announced and {done} came; nothing was written")


def read_top_k(folder: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a cache, mapped from disk and not read: indices [n, t, k], logp [n, t, k], tail [n, t].

    Raises:
      UserError: a file is missing, damaged, or does not fit the others.
    """
    cache = {key: _mapped(Path(folder) / f"{key}.npy", kinds) for key, kinds in _KINDS.items()}
    indices, logp, tail = (cache[key].shape for key in _KEYS)
    if indices != logp or indices[:-1] != tail:
        raise UserError(f"{folder} is no cache of one teacher: indices {indices}, logp {logp}, tail {tail}")
    return cache


def _mapped(path: Path, kinds: tuple[str, ...]) -> np.ndarray:
    """The array of a .npy file, mapped. Its header is judged before numpy divides by the size of its type."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version} of the format")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        if fortran or dtype.str not in kinds:
            raise ValueError(f"its type is {dtype.str}, not {' or '.join(kinds)}")
        size = path.stat().st_size - start
        if min(shape, default=0) < 1 or math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"{size} bytes for the shape {list(shape)}")
        return np.memmap(path, dtype, "r", start, shape)
    except Exception as e:  # numpy's reader of headers lets through whatever Python's parser raises
        raise UserError(f"{path} cannot be read ({e}); a cache is a folder that write_top_k wrote") from e


def rows(cache: Mapping[str, np.ndarray], numbers: Any) -> dict[str, np.ndarray]:
    """The cached teacher of some sequences, for `top_k_loss`.

    Args:
      cache: from `read_top_k`.
      numbers: ints [b], which sequences, in any order.

    Returns: indices i32[b, t, k], logp f32[b, t, k], tail f32[b, t].

    Raises:
      UserError: a number outside the cache.
    """
    numbers, count = np.asarray(numbers), len(cache["tail"])
    wrong = numbers[(numbers < 0) | (numbers >= count)]
    if wrong.size:
        raise UserError(f"the cache holds the sequences 0 to {count - 1}, not {wrong[0]}")
    types = {"indices": np.int32, "logp": np.float32, "tail": np.float32}
    return {key: cache[key][numbers].astype(types[key]) for key in _KEYS}


def _cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        x = np.maximum(x, np.finfo(dtype).min)  # 16 bits end at -65504, whose exponential is 0 as well
    return x.astype(dtype)


def _write_header(file: Any, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    # Plain writes behind it, not a memory map: a full disk is then an error and not a killed process.
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _check(arrays: dict[str, np.ndarray], inner: dict[str, tuple[int, ...]], vocab: int, done: int) -> None:
    for key, a in arrays.items():
        if a.shape[1:] != inner[key] or len(a) != len(arrays["tail"]):
            raise UserError(f"the cache's {key} are [b, {', '.join(map(str, inner[key]))}], got {list(a.shape)}")
        if key != "indices" and np.isnan(a).any():
            raise UserError(f"the teacher's {key} is NaN in the sequences from {done}")
    indices = arrays["indices"]
    if indices.size and not 0 <= indices.min() <= indices.max() < vocab:
        raise UserError(f"the teacher names token {indices.max()}, outside a vocabulary of {vocab}")
