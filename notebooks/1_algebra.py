# %% [markdown]
# # The algebra in twenty lines
#
# Every published method of quantization is a sentence of four words:
#
#     reparametrize >> represent >> round >> tune
#
# Here each word is an object, and `>>` joins them. We take one weight, add a word at a time, keep the bits, and watch
# the loss of the layer's output fall.

# %%
import jax.numpy as jnp
import numpy as np
from IPython.display import HTML

import qjax
from qjax.formats.integer import affine
from qjax.reparam import hadamard
from qjax.rounding import ldlq, nearest, refit
from qjax.tables import html_table

# %% [markdown]
# A layer of 256 inputs, as language models have them: its inputs are correlated, and seven of its input channels are
# ten times as large as the others.

# %%
rng = np.random.default_rng(0)
mix = rng.standard_normal((256, 256)) / 16 * np.where(np.arange(256) % 37 == 3, 10, 1)
seen, unseen = jnp.asarray(rng.standard_normal((2, 2048, 256)) @ mix, jnp.float32)
params = {"w": jnp.asarray(rng.standard_normal((256, 128)), jnp.float32)}


def apply(params, x):
    return x @ params["w"]


# %% [markdown]
# Calibration is one call. It traces `apply` and keeps of every weight the second moment of its inputs, H = E[x x^T], in
# which the loss of the output is a square: E|(W - W_hat) x|^2 = tr(E H E^T) with E = W - W_hat.

# %%
stats = qjax.observe(apply, params, [seen])
stats["w"]

# %% [markdown]
# Four sentences, each a word longer than the one before it: represent and round to nearest; round with feedback of the
# errors; rotate in front of both; tune the scales behind them.

# %%
grid = affine(2, group=64)
sentences = {
    "represent >> nearest": grid >> nearest(),
    "represent >> feedback": grid >> nearest() >> ldlq(),
    "rotate >> represent >> feedback": hadamard("in") >> grid >> nearest() >> ldlq(),
    "rotate >> represent >> feedback >> tune": hadamard("in") >> grid >> nearest() >> ldlq() >> refit(2, 2),
}
packed = {}
for name, sentence in sentences.items():
    plan = qjax.Plan((qjax.Rule("w", qjax.recipe(sentence)),))
    packed[name], report = qjax.quantize_params(params, plan, stats)
report

# %% [markdown]
# A sentence is data. It prints as a line, which is read back to the same recipe.

# %%
recipe = qjax.recipe(sentences["rotate >> represent >> feedback >> tune"])
assert recipe == qjax.recipe(str(recipe))
assert recipe == qjax.recipe("hadamard('in') >> uint2_g64 >> nearest() >> ldlq() >> refit(2, 2)")
recipe

# %% [markdown]
# So is what came out: codes, scales, and the rotation's seed, in a pytree that runs, saves and shards like an array.

# %%
packed["rotate >> represent >> feedback >> tune"]["w"]

# %% [markdown]
# Now the two claims. **The bits are equal**: a rotation adds four bytes, its seed, which is a thousandth of a bit a
# weight. **The loss falls with every word**, to less than a fifth in the end, and not only under the H that the
# rounding saw: these are inputs it did not see.

# %%
target = apply(params, unseen)


def loss(q):
    """|y_hat - y|^2 / |y|^2 on unseen inputs, the layer run packed."""
    return float(jnp.sum((qjax.lift(apply)(q, unseen) - target) ** 2) / jnp.sum(target**2))


losses = [loss(q) for q in packed.values()]
bits = [q["w"].bits_per_weight for q in packed.values()]

assert max(bits) - min(bits) <= 8 * 4 / params["w"].size
assert losses == sorted(losses, reverse=True)
assert losses[-1] < losses[0] / 5

rows = [(name, f"{b:.3f}", f"{v:.3f}") for name, b, v in zip(packed, bits, losses, strict=True)]
HTML(html_table("One weight, unseen inputs", ("sentence", "bits per weight", "relative loss"), rows, (1, 2)))

# %% [markdown]
# The words are independent: [any rounding goes on any format](2_any_rounding_any_format.ipynb), behind any change of
# variables ([rounding](../docs/rounding.md), [changes of variables](../docs/reparam.md)).
