"""Steps of windows on eight devices: each on its own, all in their order, and the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np

from qjax.models.devices import each_step, rounds


@jax.jit
def program(scale, x, y):
    return {"sum": jnp.sum(scale * x, axis=0), "y": y}


def test_every_step_has_a_device_and_comes_in_order(rng):
    """Two rounds of eight; three steps left, and a short one, on the first device."""
    x = rng.standard_normal((39, 5)).astype(np.float32)
    steps = [slice(i, min(i + 2, 39)) for i in range(0, 39, 2)]
    where = []

    def watched(*args):
        found = program(*args)
        where.extend(d.id for d in found["sum"].devices())
        return found

    scale = jnp.float32(1.5)
    found = dict(zip(range(20), each_step(watched, (), (scale,), (x, None), steps), strict=True))
    assert sorted(where) == sorted([*range(8), *range(8), 0, 0, 0, 0])
    for i, (at, made) in found.items():
        assert at == steps[i] and made["y"] is None and made["sum"].devices() == {jax.devices()[0]}
        np.testing.assert_array_equal(made["sum"], program(scale, x[at], None)["sum"])


def test_rounds_are_of_one_length():
    steps = [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 7), slice(7, 9), slice(9, 11)]
    assert list(rounds(steps, 2)) == [steps[:2], steps[2:3], steps[3:5], steps[5:]]
