"""The text a model writes itself: drawn from its own distribution, the same for a seed, one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import tiny

from qjax.models import own_text
from qjax.models.generate import Sampling, sample
from qjax.models.model import Model
from qjax.models.own_text import own_tokens


@pytest.fixture(scope="module")
def model():
    return Model(*tiny("llama"))


def test_every_token_is_drawn_from_the_logits_of_those_before_it(model):
    own_text._written.clear_cache()
    told = []
    made = own_tokens(model, 3, 20, seed=5, batch=2, progress=lambda *at: told.append(at))
    assert made.shape == (3, 20) and made.dtype == np.int32 and told[-1] == (60, 60)
    keys = jax.random.split(jax.random.key(5), 3)
    logits = model.logits(jnp.asarray(made))
    for row, key, found in zip(made, keys, logits, strict=True):
        for n in (1, 2, 19):
            drawn = sample(found[None, n - 1], Sampling(own_text.TEMPERATURE), jax.random.fold_in(key, n))
            assert row[n] == int(drawn[0]), n
    assert not np.array_equal(made[0], made[1])
    np.testing.assert_array_equal(made, own_tokens(model, 3, 20, seed=5, batch=2))
    assert own_text._written._cache_size() == 2  # a batch of two windows and one of one
    assert not np.array_equal(made, own_tokens(model, 3, 20, seed=6, batch=2))


def test_a_window_longer_than_a_step(model, monkeypatch):
    monkeypatch.setattr(own_text, "_STEPS", 8)
    own_text._written.clear_cache()
    made = own_tokens(model, 2, 20, seed=5)
    np.testing.assert_array_equal(made[:, 1:], own_tokens(model, 2, 21, seed=5)[:, 1:20])
    own_text._written.clear_cache()  # it was traced with another step
