"""Divergences by their definitions in float64, and central differences: what distillation losses are held to."""

import jax.numpy as jnp
import numpy as np

from qjax.training.losses.distill import divergence

FOUR = ["fkl", "rkl", "jsd", "cakld"]

NAMED = {
    "fkl": divergence("fkl"),
    "rkl": divergence("rkl"),
    "jsd": divergence("jsd"),
    "jsd3": divergence("jsd", 0.3),
    "cakld": divergence("cakld", 0.7),
}


def probabilities(z, temperature=1.0):
    z = np.asarray(z, np.float64) / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0.0).sum(-1)


def jensen_shannon(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


REFERENCES = {
    "fkl": kl,
    "rkl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: jensen_shannon(p, q, 0.5),
    "jsd3": lambda p, q: jensen_shannon(p, q, 0.3),
    "cakld": lambda p, q: 0.7 * kl(q, p) + 0.3 * kl(p, q),
}


def reference(name, teacher, student, mask=None, temperature=1.0):
    d = REFERENCES[name](probabilities(teacher, temperature), probabilities(student, temperature))
    return temperature**2 * np.average(d, weights=None if mask is None else np.asarray(mask, np.float64))


def differences(fn, x):
    """Central differences of a float64 numpy function."""
    x, out = np.asarray(x, np.float64), np.zeros(x.shape)
    for at in np.ndindex(*x.shape):
        step = np.zeros(x.shape)
        step[at] = 1e-5
        out[at] = (fn(x + step) - fn(x - step)) / 2e-5
    return out


def pair(rng, *shape, spread=2.0):
    return tuple(jnp.asarray(spread * rng.standard_normal(shape), jnp.float32) for _ in range(2))
