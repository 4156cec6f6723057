# %% [markdown]
# # Any rounding on any format
#
# A format knows nothing of roundings, and a rounding nothing of formats. So there is no list of pairs that work: there
# is a table, and every cell of it is filled. One of its rows is a format that we make up here.

# %%
import jax.numpy as jnp
import numpy as np
from IPython.display import HTML

import qjax
from qjax.formats.fields import Blocks, Half, Planes
from qjax.formats.ggml_simple import OneScale
from qjax.formats.grid import GGML
from qjax.formats.levels import Integers
from qjax.rounding import descend, ldlq, nearest, round_weight
from qjax.tables import html_table

# %% [markdown]
# A format is levels x scaling x layout. Two lines make one that no file knows: integers from -2 to 1, a scale for each
# 32 of them, found at the block's peak, and stored as a half float and a plane of two bits. (200 would be its number in
# a file.) That is 2.5 bits a weight, ten bytes a block.

# %%
layout = Blocks(200, 32, (Half("d"), Planes("q", 32, 2)), bias=(("q", 2),))
mine = GGML("Q2_0X", Integers(-2, 1), OneScale(32, "peak"), layout)

assert (mine.bits_per_weight, mine.block_bytes) == (2.5, 10)

# %% [markdown]
# The columns of the table: llama.cpp's Q4_0, a K-quant, plain integers of 3 bits, and ours. The rows: nearest; GPTQ's
# feedback of errors; descent, which moves one column at a time to its best level. The weight has 256 correlated inputs.

# %%
formats = (qjax.format("Q4_0"), qjax.format("Q3_K"), qjax.format("uint3_g64"), mine)
roundings = {
    "nearest": (nearest("h"),),
    "nearest >> ldlq": (nearest("h"), ldlq()),
    "nearest >> descend": (nearest("h"), descend(2)),
}
rng = np.random.default_rng(0)
x = rng.standard_normal((2048, 256)) @ rng.standard_normal((256, 256)) / 16
stats = qjax.Stats(H=jnp.asarray(x.T @ x / 2048, jnp.float32))
w = jnp.asarray(rng.standard_normal((64, 256)), jnp.float32)
losses = {
    fmt.name: {name: float(round_weight(w, fmt, chain, stats).loss) for name, chain in roundings.items()}
    for fmt in formats
}

# %% [markdown]
# The cells are relative losses of the output, tr(E H E^T) / tr(W H W^T). **Both calibrated roundings leave less than
# three quarters of nearest's loss, on every format**, the one made up above included.

# %%
for by_rounding in losses.values():
    start, *calibrated = by_rounding.values()
    assert all(loss < 0.75 * start for loss in calibrated)

rows = [(name, *(f"{losses[fmt.name][name]:.4f}" for fmt in formats)) for name in roundings]
heads = ("relative loss", *(f"{fmt.name}, {fmt.bits_per_weight:.3g} bits" for fmt in formats))
HTML(html_table("Any rounding on any format", heads, rows, range(1, 5)))

# %% [markdown]
# The record goes wherever a name goes. **What it packs has the bits that it says, and the file's bytes**: ten for each
# 32 weights.

# %%
q = qjax.quantize(w, mine)

assert q.bits_per_weight == 2.5
assert len(qjax.to_bytes(q)) == w.size // 32 * 10
q

# %% [markdown]
# [Adding to qjax](../docs/extending.md) says how it gets a name of its own; the tests then cross it with everything
# else.
