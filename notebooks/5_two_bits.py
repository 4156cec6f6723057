# %% [markdown]
# # Rotations, outliers and 2 bits
#
# At 2 bits a group of weights has four levels, and one outlier takes them all. A rotation of the input spreads outliers
# over all channels, and undoes itself in the input: W x = (W R^T)(R x). We plant outliers, look at what a rotation
# makes of them, and at what it is worth: alone, and in front of feedback.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML

import qjax
from qjax.evaluate.outliers import outliers
from qjax.formats.integer import affine
from qjax.reparam import Site, hadamard, reparametrize
from qjax.rounding import ldlq, nearest
from qjax.tables import html_table

# %% [markdown]
# 256 input channels. In four of them the weights are twenty times as large as in the others, in four more the inputs
# ten times.

# %%
rng = np.random.default_rng(0)
channel = np.arange(256)
mix = rng.standard_normal((256, 256)) / 16 * np.where(channel % 64 == 11, 10, 1)
seen, unseen = jnp.asarray(rng.standard_normal((2, 2048, 256)) @ mix, jnp.float32)
w = jnp.asarray(rng.standard_normal((128, 256)) * np.where(channel % 64 == 35, 20, 1), jnp.float32)

# %% [markdown]
# Kurtosis says how heavy the tails are: 3 for a normal distribution. **The rotation takes the planted kurtosis away**,
# more than 50 of weights and of inputs, **and leaves what a normal distribution has**.

# %%
rotate = hadamard("in")
found = outliers(w, seen, {"as it is": (), "rotated": (rotate,)})

for kind in ("weight_kurtosis", "input_kurtosis"):
    assert found["as it is"][kind] > 50
    assert 2.5 < found["rotated"][kind] < 3.5

rows = [
    (name, f"{numbers['weight_kurtosis']:.1f}", f"{numbers['input_kurtosis']:.1f}") for name, numbers in found.items()
]
HTML(html_table("Kurtosis", ("layer", "weights", "inputs"), rows, (1, 2)))

# %% [markdown]
# The weights' histogram, logarithmic, and the levels that the group with the largest outlier takes. **Before the
# rotation one level takes more than nine tenths of the group; behind it none takes six tenths.**

# %%
grid = affine(2, group=64)
rotated = reparametrize((rotate,), Site(w, qjax.Stats(), grid))[0].w
row = int(jnp.argmax(jnp.abs(w[:, 35])))
figure, panels = plt.subplots(1, 2, figsize=(8, 2.6), sharey=True, layout="constrained")
largest = {}
for panel, title, values in zip(panels, found, (w, rotated), strict=True):
    levels, counts = np.unique(qjax.dequantize(qjax.quantize(values, grid))[row, :64], return_counts=True)
    largest[title] = counts.max() / 64
    panel.hist(np.asarray(values).ravel(), bins=80, color="#5f7d9c")
    for level in levels:
        panel.axvline(level, color="#b3263f", linewidth=1)
    panel.set(title=f"{title}: {100 * largest[title]:.0f} % on one level", xlabel="weight", yscale="log")
plt.show()

assert largest["as it is"] > 0.9
assert largest["rotated"] < 0.6

# %% [markdown]
# What that is worth at 2 bits: the loss of the output on inputs that no rounding saw. Nearest and GPTQ's feedback
# (`ldlq`), each alone and behind the rotation, the plans differ in the recipe alone.

# %%
params = {"w": w}


def apply(params, x):
    return x @ params["w"].T


stats = qjax.observe(apply, params, [seen])
target = apply(params, unseen)
losses, packed = {}, {}
for name, recipe in {
    "nearest": grid >> nearest(),
    "hadamard >> nearest": rotate >> grid >> nearest(),
    "ldlq": grid >> nearest() >> ldlq(),
    "hadamard >> ldlq": rotate >> grid >> nearest() >> ldlq(),
}.items():
    plan = qjax.Plan((qjax.Rule("w", qjax.recipe(recipe)),))
    packed[name], report = qjax.quantize_params(params, plan, stats, axes={"w": -1})
    y = qjax.lift(apply)(packed[name], unseen)
    losses[name] = float(jnp.sum((y - target) ** 2) / jnp.sum(target**2))
report

# %% [markdown]
# **Together they do what neither does alone.** The rotation alone leaves more than half of nearest's loss, and so does
# feedback alone, for an outlier in the weights costs its group the grid before feedback begins. The rotation in front
# of feedback leaves less than four tenths of either.

# %%
alone = losses["hadamard >> nearest"], losses["ldlq"]

assert min(alone) > 0.5 * losses["nearest"]
assert losses["hadamard >> ldlq"] < 0.4 * min(alone)

rows = [(name, f"{packed[name]['w'].bits_per_weight:.3f}", f"{loss:.3f}") for name, loss in losses.items()]
HTML(html_table("Unseen inputs", ("recipe", "bits per weight", "relative loss"), rows, (1, 2)))

# %% [markdown]
# **It costs four bytes**, the seed of the rotation's signs. The codes are those of any QTensor, and `dot` rotates the
# input.

# %%
q = packed["hadamard >> ldlq"]["w"]

assert q.nbytes == packed["ldlq"]["w"].nbytes + 4
q

# %% [markdown]
# Real layers have fewer outliers than this one, and gain less: what was measured, and which rotations fold into a
# model's weights so that nothing is left to do at run time, is in [changes of variables](../docs/reparam.md).
