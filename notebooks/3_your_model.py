# %% [markdown]
# # Calibrate and quantize your model
#
# A model is a function of its weights and its inputs. Whether flax linen, flax nnx or plain arithmetic wrote it, the
# same three calls calibrate it, round it and run it packed. There are no hooks, and no layer classes to swap.

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from IPython.display import HTML

import qjax
from qjax.tables import html_table

key = jax.random.key(0)
mix = jax.random.normal(key, (128, 128)) / 11  # correlated inputs
seen, unseen = (jax.random.normal(jax.random.fold_in(key, i), (1024, 128)) @ mix for i in (1, 2))


# %% [markdown]
# The same little network three times. Linen keeps its weights in a tree beside it:


# %%
class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(128, name="down")(nn.gelu(nn.Dense(128, name="up")(x)))


linen = Linen()
linen_params = linen.init(key, seen)


def linen_apply(params, x):
    return linen.apply(params, x)


# %% [markdown]
# nnx keeps them in the model, which is a tree itself:


# %%
class NNX(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(128, 128, rngs=rngs)
        self.down = nnx.Linear(128, 128, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


nnx_model = NNX(nnx.Rngs(0))


def nnx_apply(model, x):
    return model(x)


# %% [markdown]
# And a function of a dict. Its second weight is stored as rows (out, in), the other way round from a flax kernel:

# %%
plain_params = {
    "up": jax.random.normal(jax.random.fold_in(key, 3), (128, 128)) / 11,
    "down": jax.random.normal(jax.random.fold_in(key, 4), (128, 128)) / 11,
}


def plain_apply(params, x):
    return jax.nn.gelu(x @ params["up"]) @ params["down"].T


# %% [markdown]
# The three calls. `observe` traces the function and gives what flows into every weight; `quantize_params` rounds the
# tree as a plan says; `lift` runs the function on packed weights. Along which axis a weight is contracted is read off
# the same trace, by `contracted_axes`; for models whose weights lie as flax stores kernels it may be left out.

# %%
plan = qjax.Plan((qjax.Rule("*down*", "Q4_0"), qjax.Rule("*", "uint3_g64")), "mine")
plan

# %%
models = {"linen": (linen_apply, linen_params), "nnx": (nnx_apply, nnx_model), "plain": (plain_apply, plain_params)}
packed, reports, errors = {}, {}, {}
for name, (apply, params) in models.items():
    target = apply(params, unseen)
    axes = qjax.contracted_axes(apply, params, seen)
    stats = qjax.observe(apply, params, [seen])
    for recipe in ("nearest", "nearest >> ldlq"):
        packed[name], reports[name] = qjax.quantize_params(params, plan, stats, recipe=recipe, axes=axes)
        y = qjax.lift(apply)(packed[name], unseen)
        errors[name, recipe] = float(jnp.linalg.norm(y - target) / jnp.linalg.norm(target))
reports["linen"]

# %% [markdown]
# **All three models are quantized alike**: the same formats, the same number of weights in each. nnx's model is still
# the same class, with packed weights inside.

# %%
assert all(
    {fmt: reports[name].formats[fmt] for fmt in ("uint3_g64", "Q4_0")} == {"uint3_g64": 128 * 128, "Q4_0": 128 * 128}
    for name in models
)
assert isinstance(packed["nnx"], NNX)
qjax.describe(packed["plain"], plain_params)

# %% [markdown]
# **Calibration pays in all three**: on inputs that it did not see, feedback leaves less than nine tenths of the error
# that rounding to nearest makes in the output.

# %%
for name in models:
    assert errors[name, "nearest >> ldlq"] < 0.9 * errors[name, "nearest"]

rows = [(name, *(f"{errors[name, recipe]:.3f}" for recipe in ("nearest", "nearest >> ldlq"))) for name in models]
HTML(html_table("|y_hat - y| / |y|, unseen inputs", ("model", "nearest", "nearest >> ldlq"), rows, (1, 2)))

# %% [markdown]
# **What runs packed is the same function**: it gives what the plain function gives on the unpacked values, under `jit`
# too.

# %%
unpacked = jax.tree.map(
    lambda leaf: qjax.dequantize(leaf) if qjax.is_qtensor(leaf) else leaf, packed["plain"], is_leaf=qjax.is_qtensor
)
y = jax.jit(qjax.lift(plain_apply))(packed["plain"], unseen)

assert jnp.allclose(y, plain_apply(unpacked, unseen), atol=1e-4)

# %% [markdown]
# More on [roundings](../docs/rounding.md), and on what `lift` can do besides ([lift](../docs/lift.md)).
