"""What counts in a language loss: masked targets change nothing, whole or in chunks, and the temperature arrives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.models.config import DecoderConfig
from qjax.training.losses.distill import distill_loss, divergence
from qjax.training.losses.objectives import Losses, Readout, language_loss
from qjax.training.losses.topk import top_k

VOCAB, D, B, T = 24, 8, 3, 6
CONFIG = DecoderConfig(vocab=VOCAB, dim=D, hidden=16, layers=1, heads=2, kv_heads=2, head_dim=4, tied=True)
TERMS = "ce + 0.5*fkl + 0.25*hidden"


def params(seed):
    rng = np.random.default_rng(seed)
    return {"embed": {"embedding": jnp.asarray(rng.normal(size=(VOCAB, D)), jnp.float32)}}


def states(p, tokens):
    """A model without context: what it says of a target hangs on the token before it alone."""
    return jnp.tanh(p["embed"]["embedding"][tokens] * 1.5)


def logits(p, tokens):
    return states(p, tokens) @ p["embed"]["embedding"].T


HIDDEN = tuple([lambda p, t: [states(p, t)]] * 2)


@pytest.fixture
def batch(rng):
    mask = rng.random((B, T + 1)) < 0.6
    mask[0] = False  # a window that does not count at all
    tokens = rng.integers(0, VOCAB, (B, T + 1))
    return {"tokens": jnp.asarray(tokens, jnp.int32), "mask": jnp.asarray(mask)}


def value(loss, batch):
    state = {"weights": params(1)}, {"teacher": params(2)}
    run = jax.value_and_grad(lambda p: loss(p, state[1], batch, jax.random.key(0)), has_aux=True)
    (total, report), gradient = run(state[0])
    return (float(total), {name: float(v) for name, v in report.items()}), gradient


@pytest.mark.sampled(1)
@pytest.mark.parametrize("chunk", [0, 7])
def test_only_targets_of_the_mask_count(batch, rng, chunk):
    def read(apply):
        return Readout(CONFIG, apply, chunk) if chunk else apply

    apply = states if chunk else logits
    loss = language_loss(read(apply), Losses(TERMS, temperature=2.0), teacher=read(apply), hidden=HIDDEN)
    (total, report), gradient = value(loss, batch)
    # The same by hand, over the pairs (token, target) that count, as one window of them.
    before, after = (np.asarray(batch["tokens"])[:, s] for s in (slice(None, -1), slice(1, None)))
    counted = np.asarray(batch["mask"])[:, 1:]
    z, z_teacher = (np.asarray(logits(params(i), before[counted]), np.float64) for i in (1, 2))
    log_q = z - np.log(np.exp(z).sum(-1, keepdims=True))
    assert report["ce"] == pytest.approx(-log_q[np.arange(len(z)), after[counted]].mean(), rel=1e-5)
    p, q = (np.exp(v / 2) / np.exp(v / 2).sum(-1, keepdims=True) for v in (z_teacher, z))
    assert report["fkl"] == pytest.approx(4 * (p * np.log(p / q)).sum(-1).mean(), rel=1e-5)
    h, h_teacher = (np.asarray(states(params(i), before[counted]), np.float64) for i in (1, 2))
    assert report["hidden"] == pytest.approx(((h - h_teacher) ** 2).mean() / h_teacher.var(), rel=1e-5)
    assert total == pytest.approx(report["ce"] + 0.5 * report["fkl"] + 0.25 * report["hidden"], rel=1e-5)
    # What does not count may be anything; but for its own token, which is the input of the next.
    last = np.asarray(batch["tokens"]).copy()
    last[:, -1] = np.where(batch["mask"][:, -1], last[:, -1], (last[:, -1] + 5) % VOCAB)
    (other, _), other_gradient = value(loss, batch | {"tokens": jnp.asarray(last)})
    assert other == total
    np.testing.assert_array_equal(
        other_gradient["weights"]["embed"]["embedding"], gradient["weights"]["embed"]["embedding"]
    )


def test_without_a_mask_all_count_and_nothing_counts_as_zero(batch):
    loss = language_loss(logits, Losses("ce + fkl"), teacher=logits)
    tokens = {"tokens": batch["tokens"]}
    assert value(loss, tokens)[0][0] == pytest.approx(
        value(loss, batch | {"mask": jnp.ones((B, T + 1))})[0][0], rel=1e-6
    )
    (none, _), gradient = value(loss, batch | {"mask": jnp.zeros((B, T + 1), bool)})
    assert none == 0 and not np.any(gradient["weights"]["embed"]["embedding"])


def test_a_cached_teacher_of_the_same_temperature(batch):
    """All of the vocabulary is kept: the loss is that of a teacher in the same step."""
    tokens, mask = batch["tokens"][:, :-1], batch["mask"][:, 1:]
    teacher, student = (logits(params(i), tokens) for i in (2, 1))
    loss = language_loss(logits, Losses("rkl", temperature=3.0))
    total = value(loss, batch | {"cached": top_k(teacher, VOCAB - 1, 3.0)})[0][0]
    assert total == pytest.approx(float(distill_loss(teacher, student, divergence("rkl"), mask, 3.0)), rel=0.02)
    assert total != pytest.approx(float(distill_loss(teacher, student, divergence("rkl"), mask)), rel=0.1)
