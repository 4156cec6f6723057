"""llama2.c's model.bin and tokenizer.bin (karpathy/llama2.c, export.py version 0): the stories models.

    dim hidden layers heads kv_heads vocab context: i32 | f32: embedding, rms_att[L], wq[L], wk[L], wv[L], wo[L],
    rms_ffn[L], w1[L], w2[L], w3[L], rms_final, two rotary tables, and the head where vocab is negative

Matrices are (out, in); rows of wq and wk are in pairs (see `rope_rows`). The tokenizer beside it: max_len: i32, then
per token score: f32, length: i32, bytes; 0 unknown, 1 BOS, 2 EOS, 3 + b the byte b.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qjax.errors import UserError
from qjax.io.rope_rows import to_halves
from qjax.io.tokenizer_spm import SPACE, spm_tokenizer
from qjax.models.config import DecoderConfig
from qjax.models.model import Model
from qjax.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, Tokenizer

_TOKENIZERS = ("tok{vocab}.bin", "tokenizer.bin")


def load_llama2c(path: str | Path) -> Model:
    """Read a model.bin, and tok<vocab>.bin or tokenizer.bin beside it where there is one.

    Raises:
      UserError: not such a file, or of another size than its header asks for.
    """
    path = Path(path)
    try:
        raw = np.fromfile(path, np.uint8)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    if raw.size < 28 or raw.size % 4:
        raise UserError(f"{path}: not a llama2.c model: {raw.size} bytes")
    dim, hidden, layers, heads, kv_heads, vocab, context = (int(n) for n in raw[:28].view("<i4"))
    tied, vocab = vocab > 0, abs(vocab)
    if min(dim, hidden, layers, heads, kv_heads, vocab, context) <= 0 or dim % heads or heads % kv_heads:
        raise UserError(f"{path}: not a llama2.c model: its header makes no sense")
    d, kv = dim // heads, dim // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (vocab, dim), "attn_norm": (layers, dim), "q": (layers, dim, dim), "k": (layers, kv, dim),
        "v": (layers, kv, dim), "o": (layers, dim, dim), "mlp_norm": (layers, dim), "gate": (layers, hidden, dim),
        "down": (layers, dim, hidden), "up": (layers, hidden, dim), "final_norm": (dim,),
        "cos": (context, d // 2), "sin": (context, d // 2), **({} if tied else {"head": (vocab, dim)}),
    }  # fmt: skip
    counts = {name: int(np.prod(shape, dtype=object)) for name, shape in shapes.items()}
    if 28 + 4 * sum(counts.values()) != raw.size:
        raise UserError(f"{path}: its header asks for {28 + 4 * sum(counts.values())} bytes, the file has {raw.size}")
    parts = np.split(raw[28:].view("<f4"), np.cumsum(list(counts.values()))[:-1])
    w = {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    config = DecoderConfig(vocab, dim, hidden, layers, heads, kv_heads, d, context=context, tied=tied)

    def kernel(rows: np.ndarray) -> dict[str, jnp.ndarray]:
        return {"kernel": jnp.asarray(rows.T)}

    params: dict = {
        "embed": {"embedding": jnp.asarray(w["embed"])},
        "final_norm": {"scale": jnp.asarray(w["final_norm"])},
    }
    for i in range(layers):
        attn = {"q": to_halves(w["q"][i], heads), "k": to_halves(w["k"][i], kv_heads), "v": w["v"][i], "o": w["o"][i]}
        params[f"layers_{i}"] = {
            "attn_norm": {"scale": jnp.asarray(w["attn_norm"][i])},
            "attn": {name: kernel(rows) for name, rows in attn.items()},
            "mlp_norm": {"scale": jnp.asarray(w["mlp_norm"][i])},
            "mlp": {name: kernel(w[name][i]) for name in ("gate", "up", "down")},
        }
    if not tied:
        params["head"] = kernel(w["head"])
    files = (path.parent / name.format(vocab=vocab) for name in _TOKENIZERS)
    file = next((f for f in files if f.is_file()), None)
    return Model(config, params, None if file is None else load_llama2c_tokenizer(file, vocab))


def load_llama2c_tokenizer(path: str | Path, vocab: int) -> Tokenizer:
    """Read a tokenizer.bin of `vocab` tokens.

    Raises:
      UserError: truncated, too long, or without the special tokens where llama2.c has them.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e
    try:
        rows = list(_rows(raw, vocab))
        texts = [str(text, "utf-8") for _, text in rows]
    except (struct.error, ValueError) as e:
        raise UserError(f"{path}: not a llama2.c tokenizer of {vocab} tokens: {e}") from None
    if [t.strip() for t in texts[:3]] != ["<unk>", "<s>", "</s>"] or texts[3:4] != ["<0x00>"]:
        raise UserError(f"{path}: expected <unk>, <s>, </s> and the bytes in front, found {texts[:4]}")
    # llama2.c spells spaces as spaces, and <s> and </s> with newlines around them.
    tokens = [t.strip() if i < 3 else t.replace(" ", SPACE) for i, t in enumerate(texts)]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * vocab][:vocab]
    return spm_tokenizer(tokens, types, [s for s, _ in rows], bos=1, eos=2, unk=0)


def _rows(raw: bytes, vocab: int) -> Iterator[tuple[float, bytes]]:
    at = 4
    for _ in range(vocab):
        score, n = struct.unpack_from("<fi", raw, at)
        at += 8
        if not 0 <= n <= len(raw) - at:
            raise ValueError("it is truncated")
        yield score, raw[at : at + n]
        at += n
    if at != len(raw):
        raise ValueError(f"{len(raw) - at} bytes are left over")
