"""The head's loss and gradient in chunks of the vocabulary: what the whole logits give, in bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_walk import tiny_model

import qjax.pipeline.head as head
from qjax.models.stages import Stages, stages_of


def explicit(stages, params, x, windows, seed, chunk):
    """From all logits at once, labels by the same noise."""

    def loss(x):
        z = stages.head(params, x)
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(z), labels[..., None], -1))

    z = stages.head(params, x)
    labels = []
    for w, rows in zip(windows, z, strict=True):
        key = jax.random.fold_in(jax.random.key(seed), w)
        starts = [min(c * chunk, stages.vocab - chunk) for c in range(-(-stages.vocab // chunk))]
        keys = [key if c == 0 else jax.random.fold_in(key, c) for c in range(len(starts))]
        noise = [jax.random.gumbel(k, (len(rows), chunk)) for k in keys]
        parts = [
            jnp.where(jnp.arange(s, s + chunk) >= c * chunk, rows[:, s : s + chunk] + g, -jnp.inf)
            for c, (s, g) in enumerate(zip(starts, noise, strict=True))
        ]
        at = jnp.argmax(jnp.concatenate(parts, -1), -1)
        labels.append(jnp.asarray(starts)[at // chunk] + at % chunk)
    labels = jnp.stack(labels)
    mass = 1 - jnp.sum(jax.nn.softmax(z) ** 2, -1)
    n = stages.norm(params, x).reshape(-1, x.shape[-1])
    return jax.grad(loss)(x), (n * mass.reshape(-1, 1)).T @ n, mass


@pytest.mark.parametrize("options", [{}, {"tied": True, "logit_softcap": 2.0}], ids=["untied", "tied, capped"])
@pytest.mark.parametrize("chunk", [7, 8192])
def test_chunks_of_the_vocabulary_give_what_the_whole_gives(monkeypatch, options, chunk):
    monkeypatch.setattr(head, "CHUNK", chunk)
    model = tiny_model(**options)
    stages = stages_of(model.config)
    assert stages.vocab % 7, "the last chunk must overlap the one before"
    name = "embed" if stages.tied else "head"
    params = {"final_norm": model.params["final_norm"], name: model.params[name]}
    x = jax.random.normal(jax.random.key(0), (3, 5, model.config.dim))
    windows = jnp.array([4, 1, 9])
    step = head.head_step.__wrapped__
    got = jax.jit(lambda x: step(stages, params, x, windows, 3))(x)  # a function of its own: CHUNK is no part of a key
    want = explicit(stages, params, x, np.asarray(windows), 3, min(chunk, stages.vocab))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_memory_does_not_grow_with_the_vocabulary():
    """4096 tokens against 262,144: their logits alone are 4 GiB."""
    dim, vocab, tokens = 64, 262_144, 4096
    stages = Stages(
        embed=lambda p, t: p["embed"]["embedding"][t],
        blocks=(),
        to_all=(),
        head=lambda p, x: x @ p["embed"]["embedding"].T,
        norm=lambda p, x: x,
        scores=lambda p, n, at, count: n @ jax.lax.dynamic_slice_in_dim(p["embed"]["embedding"], at, count).T,
        tied=True,
        vocab=vocab,
        dim=dim,
        head_dim=dim,
    )
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    params = {"embed": {"embedding": f32(vocab, dim)}}
    windows = jax.ShapeDtypeStruct((tokens // 512,), jnp.int32)
    made = head.head_step.lower(stages, params, f32(tokens // 512, 512, dim), windows, 0).compile()
    assert made.memory_analysis().temp_size_in_bytes < 256 << 20
