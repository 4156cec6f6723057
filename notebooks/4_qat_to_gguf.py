# %% [markdown]
# # Training through a GGUF grid
#
# Rounding a finished model to ternary weights breaks it. A model that trains *through* the rounding learns weights that
# survive it. Here a little classifier trains through `TQ2_0`, llama.cpp's ternary type of 2.06 bits, and goes into a
# GGUF file whose bytes are the ones it trained on: not close to them, the same.

# %%
import tempfile
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax
from IPython.display import HTML

import qjax
from qjax.io.gguf_write import TensorInfo, write_gguf
from qjax.tables import html_table

# %% [markdown]
# Points on a sheet of 12 dimensions in a space of 256, in ten classes, and a network of two weights that tells them
# apart. The weights are rows (out, in), as in a GGUF file.

# %%
keys = iter(jax.random.split(jax.random.key(0), 8))
sheet = jax.random.normal(next(keys), (12, 256)) / 12**0.5
classes = jax.random.normal(next(keys), (12, 10))


def points(key, count):
    z = jax.random.normal(key, (count, 12))
    return z @ sheet, jnp.argmax(jnp.abs(z @ classes), axis=1)


train, test = points(next(keys), 4096), points(next(keys), 2048)
params = {
    "up.weight": jax.random.normal(next(keys), (256, 256)) / 16,
    "down.weight": jax.random.normal(next(keys), (10, 256)) / 16,
}


def apply(params, x):
    return jax.nn.gelu(x @ params["up.weight"].T) @ params["down.weight"].T


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


# %% [markdown]
# A training loop of our own, 600 steps of Adam. It trains whatever tree the loss takes.


# %%
def trained(tree, loss):
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 600))

    def step(carry, i):
        tree, state = carry
        x, y = (jax.lax.dynamic_slice_in_dim(a, i % 16 * 256, 256) for a in train)
        updates, state = optimizer.update(jax.grad(loss)(tree, x, y), state)
        return (optax.apply_updates(tree, updates), state), None

    return jax.jit(lambda tree: jax.lax.scan(step, (tree, optimizer.init(tree)), jnp.arange(600))[0][0])(tree)


floats = trained(params, loss)

# %% [markdown]
# `qat` gives a tree to train, the weights that the forward runs on, and the packed model in the end. The forward is
# literally dequantize(quantize(w)); the gradient passes straight through.

# %%
start, fake, export = qjax.qat(apply, floats, "TQ2_0", train[0])
tree = trained(start, lambda tree, x, y: loss(fake(tree), x, y))
packed = export(tree)
qjax.describe(packed, tree["weights"])

# %% [markdown]
# **Training through the grid keeps what rounding loses.** Rounded, the float model makes more than twice the mistakes
# on points that it did not see, and so does a float model that trained for as many steps as the ternary one did in all.
# Trained through the grid, it makes less than a fifth more than the float model.

# %%
x, y = test


def mistakes(params):
    return float(jnp.mean(jnp.argmax(apply(params, x), axis=1) != y))


longer = qjax.qat(apply, trained(floats, loss), "TQ2_0", train[0])
shares = {
    "float": mistakes(floats),
    "rounded": mistakes(fake(start)),
    "trained on as floats, rounded": mistakes(longer.fake(longer.start)),
    "trained through the grid": mistakes(fake(tree)),
}
assert shares["rounded"] > 2 * shares["float"]
assert shares["trained on as floats, rounded"] > 2 * shares["float"]
assert shares["trained through the grid"] < 1.2 * shares["float"] + 0.01

rows = [(name, f"{100 * share:.1f} %") for name, share in shares.items()]
HTML(html_table("Mistakes on 2048 unseen points", ("model", "mistakes"), rows, (1,)))

# %% [markdown]
# The file: names, shapes, types, and of each weight its bytes.

# %%
folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "classifier.gguf"
infos = [TensorInfo(name, q.shape, q.format.name) for name, q in packed.items()]
write_gguf(path, {"general.architecture": "classifier"}, infos, [qjax.to_bytes(q) for q in packed.values()])

# %% [markdown]
# Now the `gguf` package of llama.cpp, which shares no code with qjax, reads it back. **Its bytes are exactly what was
# exported, and its own unpacking of them gives, bit for bit, the values that the last forward ran on.**

# %%
ran_on = jax.jit(fake)(tree)
tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

assert tensors.keys() == packed.keys()
for name, tensor in tensors.items():
    assert tensor.tensor_type == gguf.GGMLQuantizationType.TQ2_0
    assert tensor.data.tobytes() == qjax.to_bytes(packed[name])
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(values.view(np.uint32), np.asarray(ran_on[name]).view(np.uint32))

# %% [markdown]
# **So it is the same classifier**: on the values from the file, run by the same function, the logits are equal to the
# last bit.

# %%
read = {name: jnp.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type)) for name, tensor in tensors.items()}

assert bool(jnp.all(apply(read, x) == apply(ran_on, x)))
rows = [(tensor.name, tensor.tensor_type.name, f"{tensor.n_bytes:,}") for tensor in tensors.values()]
HTML(html_table("What the file holds", ("tensor", "type", "bytes"), rows, (2,)))

# %% [markdown]
# [Training through the grid](../docs/training.md) has learned scales, distillation, adapters, and whole decoders.
