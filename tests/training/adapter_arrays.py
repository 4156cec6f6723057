"""Arrays for the tests of adapters."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed, *shape, size=1.0):
    return jnp.asarray(size * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def f64(x):
    return np.asarray(x, np.float64)


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
