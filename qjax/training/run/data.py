"""Training text as one long row of tokens in a file, and batches that are a function of the step alone.

    window i  =  tokens[i c : i c + c + 1]                          i = 0 .. n - 1,    n = (tokens - 1) // c
    row r of step s  =  window  order_e[k]                          e, k = divmod(s batch + r, n)
    order_e  =  a permutation of the n windows drawn from (seed, epoch e)

c is the context. Neighbouring windows share one token, so that each token but the first is predicted exactly once an
epoch. Where an epoch ends inside a batch, the next one begins there. There is no other position than the step: a run
that goes on at step s sees the batches that it would have seen, on any number of processes.

    write_tokens("train.bin", ([0, *tokenizer.encode(text).ids] for text in texts), vocab=4096)
    windows = Batches(open_tokens("train.bin"), context=512, batch=64, seed=0)
    windows.batch_at(step)                                                                  i32[batch, context + 1]
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qjax.errors import UserError
from qjax.io.atomic import atomic_file, write_text
from qjax.typing import Int, Integer

_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A row of tokens, equal to another when vocabulary and bytes are.

    Attributes:
      values: integers [count]; of a file, a read-only memory map.
      vocab: tokens are 0 .. vocab - 1.
      sha256: of the file's bytes, hexadecimal.
    """

    values: Integer[np.ndarray, "count"] = dataclasses.field(compare=False, repr=False)
    vocab: int
    sha256: str


def write_tokens(path: str | Path, chunks: Iterable[Sequence[int] | np.ndarray], vocab: int) -> Tokens:
    """Write tokens, chunk after chunk, and their description beside them in `<path>.json`.

    Args:
      path: the file of little-endian uint16 (vocab <= 65536) or uint32; an existing one is replaced.
      chunks: rows of integers in 0 .. vocab - 1, e.g. one a document; only one of them is held at a time.
      vocab: the tokenizer's size, at most 2^31.

    Returns: the written tokens, opened.

    Raises:
      UserError: a token outside of the vocabulary, a chunk that is no row of integers, no tokens at all, or a file
        that cannot be written. Nothing is left under the name then, or what was there before.
    """
    path = Path(path)
    if not 0 < vocab <= 2**31:
        raise UserError(f"{path}: a vocabulary has 1 to 2^31 tokens, got {vocab}")
    name = "uint16" if vocab <= 2**16 else "uint32"
    count, digest = 0, hashlib.sha256()
    with atomic_file(path) as f:
        for number, chunk in enumerate(chunks):
            data = _checked(chunk, vocab, f"{path}: chunk {number}").astype(_DTYPES[name])
            f.write(data.data)
            digest.update(data.data)
            count += len(data)
        if count == 0:
            raise UserError(f"{path}: there is not one token to write")
        # Two files cannot be renamed at once: a kill in between leaves no description rather than a wrong one.
        description_of(path).unlink(missing_ok=True)
    facts = {"dtype": name, "count": count, "vocab": vocab, "sha256": digest.hexdigest()}
    write_text(description_of(path), json.dumps(facts, indent=1) + "\n")
    return open_tokens(path)


def open_tokens(path: str | Path) -> Tokens:
    """Open what `write_tokens` wrote, without reading it.

    Raises:
      UserError: the file or its description is missing or unreadable, or the file's size is another than described.
    """
    path = Path(path)
    facts = _described(path)
    dtype = _DTYPES[facts["dtype"]]
    try:
        size = path.stat().st_size
        if size != facts["count"] * dtype.itemsize:
            raise UserError(
                f"{path} has {size} bytes, but {description_of(path).name} says {facts['count']} tokens of "
                f"{dtype.itemsize} bytes; write it again"
            )
        values = np.memmap(path, dtype, "r")
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read the tokens {path}: {e}") from None
    return Tokens(values, facts["vocab"], facts["sha256"])


def verify(tokens: Tokens) -> None:
    """Read every byte and compare with the sha256. Raises UserError where they are not the bytes that were written."""
    found = hashlib.sha256(np.ascontiguousarray(tokens.values).view(np.uint8).data).hexdigest()
    if found != tokens.sha256:
        raise UserError(f"the tokens' bytes have sha256 {found}, but {tokens.sha256} was written; write them again")


def description_of(path: str | Path) -> Path:
    """The file beside a token file that says what it holds."""
    path = Path(path)
    return path.with_name(path.name + ".json")


@dataclasses.dataclass(frozen=True)
class Batches:
    """Batches of windows in a new order each epoch; see the module's docstring.

    Attributes:
      tokens: the text.
      context: tokens a window predicts; it holds one more.
      batch: windows a step, over all processes.
      seed: of the orders.

    Raises:
      UserError: fewer tokens than a window has, or a context, batch or seed out of range.

    >>> text = Tokens(np.arange(9, dtype=np.uint16), vocab=9, sha256="")
    >>> windows = Batches(text, context=2, batch=2, seed=0)
    >>> windows.count
    4
    >>> sorted([*windows.index(0).tolist(), *windows.index(1).tolist()])
    [0, 2, 4, 6]
    """

    tokens: Tokens
    context: int
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("context", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.count < 1:
            raise UserError(
                f"{len(self.tokens.values)} tokens make no window of {self.context + 1}; take more text or a "
                f"context of at most {len(self.tokens.values) - 1}"
            )

    @property
    def count(self) -> int:
        """Batches an epoch."""
        return (len(self.tokens.values) - 1) // self.context

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must share to go on with these batches (`loop.train`)."""
        return {"data": self.tokens.sha256, "context": self.context, "batch": self.batch, "order": self.seed}

    def index(self, step: int, orders: dict[int, np.ndarray] | None = None) -> Int[np.ndarray, "batch"]:
        """Where the windows of a step's batch start: i64[batch]. Step 0 is the first.

        Args:
          orders: {epoch: order}, which the steps of a run may share: what is missing is added, epochs gone by leave.
        """
        if step < 0:
            raise UserError(f"steps count from 0, got {step}")
        epoch, within = np.divmod(np.arange(step * self.batch, (step + 1) * self.batch), self.count)
        orders = {} if orders is None else orders
        windows = np.empty(self.batch, np.int64)
        for e in map(int, np.unique(epoch)):
            if e not in orders:
                orders[e] = np.random.default_rng((self.seed, e)).permutation(self.count)
            windows[epoch == e] = orders[e][within[epoch == e]]
        for gone in [e for e in orders if e < epoch[0]]:
            del orders[gone]
        return windows * self.context

    def batch_at(
        self, step: int, process: int = 0, processes: int = 1, orders: dict[int, np.ndarray] | None = None
    ) -> Int[np.ndarray, "rows width"]:
        """The batch of a step, or one process's contiguous part of its rows.

        Args:
          step: from 0; the same on all processes.
          process, processes: whose part; `jax.process_index()` and `jax.process_count()`.
          orders: see `index`.

        Returns: i32[batch / processes, context + 1].

        Raises:
          UserError: a batch that the processes do not divide, or a token outside of the vocabulary.
        """
        if not 0 <= process < processes:
            raise UserError(f"there is no process {process} among {processes}; they count from 0")
        if self.batch % processes:
            raise UserError(f"a batch of {self.batch} windows does not divide among {processes} processes")
        rows = self.batch // processes
        starts = self.index(step, orders)[process * rows : (process + 1) * rows]
        windows = np.asarray(self.tokens.values[starts[:, None] + np.arange(self.context + 1)])
        bad = (windows < 0) | (windows >= self.tokens.vocab)
        if bad.any():
            raise UserError(
                f"step {step}: token {windows[bad][0]} lies outside of the vocabulary of {self.tokens.vocab}; "
                "the token file is damaged or belongs to another tokenizer"
            )
        return windows.astype(np.int32)


def _checked(chunk: Any, vocab: int, where: str) -> np.ndarray:
    row = np.asarray(chunk)
    if row.ndim == 1 and row.size == 0:
        return row.astype(np.int64)
    if row.ndim != 1 or row.dtype.kind not in "iu":
        raise UserError(f"{where} must be a row of integers, got {row.dtype}{list(row.shape)}")
    for token in (row.min(), row.max()):
        if not 0 <= token < vocab:
            raise UserError(f"{where}: token {token} lies outside of the vocabulary of {vocab}")
    return row


def _described(path: Path) -> dict:
    """The description of a token file, with keys and types checked."""
    file = description_of(path)
    if not path.is_file():
        raise UserError(f"there is no token file {path}")
    if not file.is_file():
        raise UserError(f"{path} has no description {file.name} beside it; write the tokens again")
    try:
        facts = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"cannot read {file}: {e}; write the tokens again") from None
    types = {"dtype": str, "count": int, "vocab": int, "sha256": str}
    good = isinstance(facts, dict) and all(type(facts.get(key)) is kind for key, kind in types.items())
    if not good or facts["dtype"] not in _DTYPES or facts["count"] < 1:
        raise UserError(f"{file} describes no tokens: it needs dtype (uint16 or uint32), count, vocab and sha256")
    return facts
