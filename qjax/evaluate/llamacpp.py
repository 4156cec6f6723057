"""The real llama.cpp as quantizer and judge: its files against ours, by its own arithmetic.

    judge = judge_of(float.gguf, tokens, first, scratch)         # the float model runs once
    numbers = [judge_file(judge, file) for file in (ours, theirs)]

llama.cpp rounds the activations of a quantized product to int8, so that its logits of a quantized file are not the
weights' alone. A judged file is therefore unpacked to F32 first, by llama.cpp itself, and runs with a float32 KV cache
and plain attention: then its logits are those of the decoded weights to 5e-7.

Needs llama-cpp-python and a libllama (scripts/build_llama_cpp.sh makes both); nothing else in qjax does. The structures
are those of llama.h as llama-cpp-python 0.3.36 declares them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.evaluate.divergence import Divergence, divergence_of_tokens
from qjax.evaluate.perplexity import Windows
from qjax.evaluate.vocabulary import kl_of, nll_of
from qjax.io.gguf_model import FILE_TYPES
from qjax.io.gguf_read import read_gguf
from qjax.io.imatrix import check_imatrix
from qjax.io.space import scratch as scratch_array
from qjax.typing import Array, Float, Int

_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_last_error: deque[str] = deque(maxlen=1)


def bindings() -> Any:
    """llama-cpp-python's module of C functions, its log silenced but for errors, which `_why` tells.

    Raises:
      UserError: it or its library is not at hand.
    """
    c, keep_errors = _library()
    c.llama_log_set(keep_errors, ctypes.c_void_p())  # each time: others in this process set a log of their own
    return c


@lru_cache(maxsize=1)
def _library() -> tuple[Any, Any]:
    """The module and the callback of its log, of which C keeps only the address."""
    try:
        from llama_cpp import llama_cpp as c
    except (ImportError, OSError, RuntimeError) as e:
        raise UserError(
            "there is no llama.cpp to run: install llama-cpp-python and point LLAMA_CPP_LIB_PATH at the folder of "
            f"libllama.so (scripts/build_llama_cpp.sh does both); {e}"
        ) from None

    @c.llama_log_callback
    def keep_errors(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            _last_error.append(" ".join(text.decode(errors="replace").split()))

    c.llama_log_set(keep_errors, ctypes.c_void_p())
    c.llama_backend_init()
    return c, keep_errors


def quantize(
    source: Path,
    out: Path,
    mix: str,
    imatrix: Mapping[str, np.ndarray] | None = None,
    pure: bool = False,
    threads: int = 2,
) -> None:
    """What llama-quantize does: a GGUF file of floats to one of a mix.

    Args:
      source: a GGUF file whose weights are F32, F16 or BF16.
      out: the file to write; it appears whole or not at all.
      mix: a file type, e.g. "Q4_K_M".
      imatrix: GGUF name of a weight -> f32[in], the importance of its inputs; others are rounded without.
      pure: every weight in the mix's main type.
      threads: of llama.cpp.

    Raises:
      UserError: no llama.cpp, an unknown mix, an imatrix of another model, or llama.cpp's own refusal.
    """
    c = bindings()
    if mix not in FILE_TYPES:
        raise UserError(f"unknown file type {mix!r}; known are {' '.join(FILE_TYPES)}")
    rows = {name: np.ascontiguousarray(x, np.float32) for name, x in (imatrix or {}).items()}
    check_imatrix(rows, {t.name: t.shape for t in read_gguf(source).tensors.values()})
    params = c.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.pure = FILE_TYPES[mix], threads, pure
    entries = (c.llama_model_imatrix_data * (len(rows) + 1))()  # the last one, of zeros, ends the list
    for entry, (name, x) in zip(entries, rows.items(), strict=False):
        entry.name, entry.size = name.encode(), x.size
        entry.data = x.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if rows:
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    _run_quantize(source, out, params)


def unpack(quantized: Path, out: Path, threads: int = 2) -> None:
    """A GGUF file with every matrix decoded to F32 by llama.cpp's own C code.

    Raises:
      UserError: no llama.cpp, or its own refusal.
    """
    params = bindings().llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = FILE_TYPES["F32"], threads, True
    _run_quantize(quantized, out, params)


def logits(path: Path, tokens: np.ndarray, first: int, threads: int = 2) -> Iterator[np.ndarray]:
    """llama.cpp's logits, window by window, each window on its own: float32 KV cache, no flash attention, on the CPU.

    Args:
      path: a GGUF file. With types other than F32, activations are rounded as well.
      tokens: i32[windows, context].
      first: the first scored position; logits of positions first .. context - 2 are made.
      threads: of llama.cpp.

    Returns: an iterator of f32[context - 1 - first, vocab]. The model is loaded at the first and freed after the last.

    Raises:
      UserError: no llama.cpp; at the first window: a file it cannot load, a context or a token the model does not have.
    """
    tokens = np.ascontiguousarray(tokens, np.int32)
    if tokens.ndim != 2 or not 0 <= first < tokens.shape[1] - 1:
        raise UserError(f"tokens must be [windows, context] with 0 <= first < context - 1, got {tokens.shape}, {first}")
    return _logits(bindings(), Path(path), tokens, first, threads)


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """The float model's answers, which files are compared with.

    Attributes:
      windows: what is read and what of it is scored.
      logits: f32[windows, scored, vocab] of the float model, in a temporary file that vanishes with it.
      scratch: the folder for files that live for one call.
      threads: of llama.cpp.
    """

    windows: Windows
    logits: np.ndarray
    scratch: Path
    threads: int


def judge_of(float_gguf: Path, tokens: np.ndarray, first: int, scratch: Path, threads: int = 2) -> Judge:
    """Run the float model once and keep its logits on disk: 4 * windows * scored * vocab bytes.

    Args:
      float_gguf: F32, or anything that unpacks to it exactly.
      tokens, first: as in `logits`; `qjax.evaluate.judge.windows_of` cuts a text so.
      scratch: a folder with room for the logits and for one model in F32.
    """
    windows = Windows(np.asarray(tokens, np.int32), first, "llama.cpp")
    kept: np.ndarray | None = None
    with _as_f32(float_gguf, scratch, threads) as path:
        for i, z in enumerate(logits(path, windows.tokens, first, threads)):
            if kept is None:
                kept = scratch_array(np.float32, (len(windows), *z.shape), scratch)
            kept[i] = z
    if kept is None:
        raise UserError("there are no windows to judge on")
    return Judge(windows, kept, Path(scratch), threads)


def judge_file(judge: Judge, quantized: Path) -> Divergence:
    """How far a GGUF file's weights are from the float model's, in llama.cpp's arithmetic and its summary.

    Raises:
      UserError: a file llama.cpp cannot unpack or load, another vocabulary, logits that are NaN or infinite.
    """
    windows = judge.windows
    token = {name: np.empty((len(windows), windows.scored), np.float32) for name in _SCORES}
    with _as_f32(quantized, judge.scratch, judge.threads) as path:
        for i, z in enumerate(logits(path, windows.tokens, windows.first, judge.threads)):
            if z.shape != judge.logits[i].shape:
                raise UserError(
                    f"{quantized}: the model has {z.shape[1]} tokens and the float model {judge.logits.shape[2]}"
                )
            for name, values in zip(_SCORES, _score(judge.logits[i], z, windows.targets[i]), strict=True):
                token[name][i] = np.asarray(values)
    return divergence_of_tokens(**token, windows=windows)


_SCORES = ("nll", "nll_base", "kl", "same_top")


@jax.jit
def _score(z_base: Float[Array, "n v"], z: Float[Array, "n v"], target: Int[Array, "n"]) -> tuple[Array, ...]:
    same_top = jnp.argmax(z, axis=1) == jnp.argmax(z_base, axis=1)
    return nll_of(z, target), nll_of(z_base, target), kl_of(z_base, z), same_top.astype(jnp.float32)


def _run_quantize(source: Path, out: Path, params: Any) -> None:
    source, out = Path(source), Path(out)
    read_gguf(source)  # says more clearly what is wrong with a file than llama.cpp does
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: no such folder")
    _last_error.clear()
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / out.name
        if bindings().llama_model_quantize(str(source).encode(), str(made).encode(), ctypes.byref(params)):
            raise UserError(f"llama.cpp cannot make {out} of {source}{_why()}")
        os.replace(made, out)


@contextmanager
def _as_f32(path: Path, scratch: Path, threads: int) -> Iterator[Path]:
    """The file itself where all its tensors are F32, else an unpacked one that lives as long as the body."""
    if all(t.type == "F32" for t in read_gguf(path).tensors.values()):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        unpack(path, Path(folder) / "f32.gguf", threads)
        yield Path(folder) / "f32.gguf"


def _logits(c: Any, path: Path, tokens: np.ndarray, first: int, threads: int) -> Iterator[np.ndarray]:
    windows, length = tokens.shape
    with ExitStack() as stack:
        model, context = _open(c, stack, path, length, threads)
        vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise UserError(f"tokens {tokens.min()} .. {tokens.max()} do not fit {path}'s vocabulary of {vocab}")
        batch = c.llama_batch_init(length, 0, 1)
        stack.callback(c.llama_batch_free, batch)
        batch.n_tokens = length
        for i in range(length):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = i, 1, 0
            batch.logits[i] = first <= i < length - 1
        for w in range(windows):
            c.llama_memory_clear(c.llama_get_memory(context), True)
            np.ctypeslib.as_array(batch.token, (length,))[:] = tokens[w]
            if c.llama_decode(context, batch):
                raise UserError(f"llama.cpp cannot run {path} on window {w}{_why()}")
            yield np.ctypeslib.as_array(c.llama_get_logits(context), (length - 1 - first, vocab)).copy()


def _open(c: Any, stack: ExitStack, path: Path, length: int, threads: int) -> tuple[Any, Any]:
    """A loaded model and a context for windows of `length` tokens, freed with the stack."""
    read_gguf(path)
    _last_error.clear()
    model_params = c.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = c.llama_model_load_from_file(str(path).encode(), model_params)
    if not model:
        raise UserError(f"llama.cpp cannot load {path}{_why()}")
    stack.callback(c.llama_model_free, model)
    if length > c.llama_model_n_ctx_train(model):
        raise UserError(f"windows of {length} tokens are more than the context of {path}")
    params = c.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = c.GGML_TYPE_F32
    params.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_seq_max = 1
    context = c.llama_init_from_model(model, params)
    if not context:
        raise UserError(f"llama.cpp cannot run {path}{_why()}")
    stack.callback(c.llama_free, context)
    return model, context


def _why() -> str:
    """llama.cpp's own last words, where it had any."""
    return f": {_last_error[0]}" if _last_error else ""
