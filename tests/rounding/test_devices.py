"""One device is eight: rows spread over a mesh get the codes they get alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rounding_problems import marked, problem

import qjax
from qjax.rounding import descend, ldlq, nearest, refit, round_weight
from qjax.stats import Stats

BEST = (nearest("h"), ldlq(), descend(), refit())


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(["int4_g128", "Q3_K", "NF4_dq", "NVFP4", "FP8_E4M3_tensor"], ["int4_g128"]))
def test_rows_over_eight_devices(name):
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    w, H = problem(64, 256)
    fmt = qjax.format(name)
    alone = round_weight(w, fmt, BEST, Stats(H=H))

    mesh = Mesh(np.array(jax.devices()[:8]), ("rows",))
    rows, everywhere = NamedSharding(mesh, P("rows", None)), NamedSharding(mesh, P())
    spread = round_weight(jax.device_put(w, rows), fmt, BEST, Stats(H=jax.device_put(H, everywhere)))

    assert float(spread.loss) == pytest.approx(float(alone.loss), rel=1e-4)
    assert np.mean(np.asarray(spread.codes) != np.asarray(alone.codes)) < 1e-4
    assert len({s.data.unsafe_buffer_pointer() for s in spread.codes.addressable_shards}) == 8


def test_layers_over_eight_devices():
    """A stack of weights, each with its own H, one on each device."""
    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    pairs = [problem(8, 128, seed) for seed in range(8)]
    w, H = (jnp.stack([p[i] for p in pairs]) for i in (0, 1))
    fmt, chain = qjax.format("int4_g128"), (nearest(), ldlq())
    run = jax.jit(jax.vmap(lambda w, H: round_weight(w, fmt, chain, Stats(H=H)).codes))
    mesh = Mesh(np.array(jax.devices()[:8]), ("layers",))
    spread = run(*(jax.device_put(a, NamedSharding(mesh, P("layers", None, None))) for a in (w, H)))
    assert np.mean(np.asarray(spread) != np.asarray(run(w, H))) < 1e-4
