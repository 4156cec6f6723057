"""Generation from packed weights: the tokens of decoded ones, no dense copy, one program a shape; batches, caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import UserError
from qjax.kernels import Kernel, Layout, dispatch, xla
from qjax.models import generate as generation
from qjax.models.cache import appended, empty_cache, remembered
from qjax.models.config import DecoderConfig
from qjax.models.decoder import Decoder
from qjax.models.generate import ENDED, Sampling, generate, generate_batch
from qjax.models.model import Model
from qjax.models.parts import Packed

pytestmark = pytest.mark.optimized  # what a program stores is XLA's to decide

CONFIG = DecoderConfig(
    family="llama", vocab=96, dim=64, layers=2, heads=4, kv_heads=2, head_dim=32, hidden=96, context=128,
    rope_theta=1e4, norm_eps=1e-5, tied=True,
)  # fmt: skip
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def packed_model(config=CONFIG, format="Q4_0"):
    params = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    def pack(path, w):
        return w if w.ndim < 2 else qjax.quantize(4 * w, format, axis=-1 if path[-1].key == "embedding" else -2)

    return Model(config, jax.tree_util.tree_map_with_path(pack, params))


@pytest.fixture(scope="module")
def model():
    return packed_model()


def test_packed_weights_make_the_tokens_of_decoded_ones(model):
    made = list(generate(Packed(model), PROMPT, 24))
    assert made == list(generate(model, PROMPT, 24)) and len(set(made)) > 2
    hot = Sampling(1.0, top_k=20)
    assert list(generate(Packed(model), PROMPT, 12, hot, jax.random.key(1))) == list(
        generate(model, PROMPT, 12, hot, jax.random.key(1))
    )


def test_one_program_serves_every_layer_and_step(model):
    generation._block.clear_cache()
    compiled = []
    steps = generate(Packed(model), PROMPT, 12)
    for _ in steps:
        compiled.append((generation._block._cache_size(), generation._scores._cache_size()))
    assert compiled[0][0] == 1 and compiled[1][0] == 2 and len(set(compiled[1:])) == 1


def test_a_step_stores_less_than_a_decoded_layer():
    config = dataclasses.replace(CONFIG, dim=512, heads=16, kv_heads=4, hidden=1536)
    params = jax.eval_shape(
        lambda: Packed(packed_model(dataclasses.replace(config, layers=1), "Q4_K")).prepacked().part("layers_0")
    )
    assert params["mlp"]["up"]["kernel"].format.layout.name == "lanes"
    cache = jax.eval_shape(lambda: empty_cache(config, 1, 64)["layers_0"])
    x = jax.ShapeDtypeStruct((1, 1, config.dim), jnp.float32)
    used = generation._block.lower(config, 0, jnp.float32, params, x, cache, 0, 1).compile().memory_analysis()
    decoded = 4 * sum(w.size for w in jax.tree.leaves(params, is_leaf=qjax.is_qtensor))
    assert used.temp_size_in_bytes < decoded / 4 and used.argument_size_in_bytes < decoded / 4
    assert used.alias_size_in_bytes == sum(
        a.size * a.dtype.itemsize for a in jax.tree.leaves(cache)
    )  # the donated cache


def test_a_batch_makes_what_its_rows_make_alone(model):
    prompts = [PROMPT, PROMPT[::-1], [7] * 8]
    alone = [list(generate(Packed(model), prompt, 8)) for prompt in prompts]
    together = np.stack(list(generate_batch(Packed(model), prompts, 8)), axis=1)
    assert together.tolist() == alone
    stop = alone[0][3]
    ends = [row.index(stop) if stop in row else 8 for row in alone]
    stopped = np.stack(list(generate_batch(Packed(model), prompts, 8, stop=[stop])), axis=1)
    for row, whole, end in zip(stopped.tolist(), alone, ends, strict=True):
        assert row[:end] == whole[:end] and set(row[end:]) <= {ENDED}
    drawn = np.stack(list(generate_batch(Packed(model), [PROMPT] * 3, 8, Sampling(2.0), jax.random.key(0))))
    assert (drawn[:, 0] != drawn[:, 1]).any()  # each text has luck of its own


def test_packed_experts_make_the_tokens_of_decoded_ones():
    """A step picks two experts of eight from their stacks, prepacked."""
    config = dataclasses.replace(CONFIG, layers=1, experts=8, experts_used=2, expert_hidden=32)
    model = Packed(packed_model(config)).prepacked()
    assert model.part("layers_0")["mlp"]["experts"]["up"]["kernel"].format.layout.name == "lanes"
    assert list(generate(model, PROMPT, 8)) == list(generate(model.model, PROMPT, 8))


def test_a_packed_cache_is_what_its_format_makes_of_keys_and_values(model, rng):
    cache = empty_cache(CONFIG, 1, 8, format="Q8_0")["layers_0"]["k"]
    y = jnp.asarray(rng.standard_normal((2, 3, 32)), jnp.float32)
    entry = appended(appended(cache, y, 0), y[:, :1], 3)
    assert entry.bits_per_weight == 8.5 and entry.shape == (2, 8, 32)
    want = qjax.dequantize(qjax.quantize(y, "Q8_0"))
    np.testing.assert_array_equal(remembered(entry)[:, :4], jnp.concatenate([want, want[:, :1]], 1))
    assert not remembered(entry)[:, 4:].any()


def test_text_from_a_packed_cache_is_that_of_a_decoder_whose_keys_are_rounded(model):
    """As trained with: `stored` gives back what the cache would."""
    made = list(generate(model, PROMPT, 10, cache="Q4_0"))
    stored = Decoder(CONFIG, stored=lambda name, x: qjax.dequantize(qjax.quantize(x, "Q4_0")))
    tokens = jnp.asarray([PROMPT + made[:-1]])
    logits = np.asarray(jax.jit(stored.apply)({"params": model.dense}, tokens))[0, len(PROMPT) - 1 :]
    np.testing.assert_allclose(logits[np.arange(10), made], logits.max(-1), atol=1e-3)
    plain = np.asarray(model.logits(tokens))[0, len(PROMPT) - 1 :]
    assert np.abs(plain - logits).max() > 1e-2


def test_weights_are_prepacked_once_for_the_kernel_of_a_step(model, monkeypatch):
    """Of a toy layout and bfloat16 steps: the prompt, of 64 rows, has the kernel that there was."""
    ran, made = [], []

    def turn(format, leaves):
        made.append(format)
        return jnp.swapaxes(leaves["blocks"], -3, -2)

    def back(packed):
        return {"blocks": jnp.swapaxes(packed, -3, -2)}

    def matmul(x, packed, format, precision):
        ran.append(x.shape)
        return xla.whole(x, back(packed), format, precision)

    def fits(call):
        return "" if call.rows == 1 and call.dtype == jnp.bfloat16 else "one row of bfloat16"

    layout = Layout("turned", turn, back, lambda p: (*p.shape[:-3], p.shape[-2], 32 * p.shape[-3]))
    own = Kernel("cpu", "pallas", "own", matmul, fits, "", layout=layout)
    monkeypatch.setattr(dispatch, "TABLE", (own, *dispatch.TABLE))
    fresh = packed_model(dataclasses.replace(CONFIG, hidden=128))  # shapes that no program was made for
    text = list(generate(Packed(fresh), PROMPT, 6, dtype=jnp.bfloat16))
    shapes = {w.shape for w in jax.tree.leaves(fresh.params["layers_0"], is_leaf=qjax.is_qtensor) if w.ndim == 2}
    assert len(made) == len(shapes) and set(ran) == {(1, 64), (1, 128)}  # traced once for each shape of leaves
    logits = np.asarray(fresh.logits(jnp.asarray([PROMPT + text[:-1]])))[0, len(PROMPT) - 1 :]
    assert (logits.max(-1) - logits[np.arange(6), text] < 0.1).all()  # bfloat16


def test_mistakes(model):
    with pytest.raises(UserError, match=r"cannot be kept in Q4_K: a head has 32 numbers.* a block of it 256"):
        generate(model, PROMPT, 4, cache="Q4_K")
    with pytest.raises(UserError, match="all of one length"):
        generate_batch(model, [[1, 2], [3]], 4)
    with pytest.raises(UserError, match="all of one length"):
        generate_batch(model, np.array([1, 2]), 4)
