"""The kernels on a GPU: nothing but the rounding of sums, at every padding of a batch, in a scan and from a plan."""

import jax
import jax.numpy as jnp
import numpy as np
import products
import pytest
import test_gpu_hadamard
import test_point_kernels

from qjax.kernels.layouts import points, supers
from qjax.kernels.layouts.planar import prepack
from qjax.kernels.mosaic_gpu import Plan, matmul
from qjax.kernels.mosaic_gpu.hadamard import rotated
from qjax.kernels.mosaic_gpu.product import accumulate
from qjax.kernels.mosaic_gpu.supers import product as super_products
from qjax.kernels.mosaic_gpu.vectors import product as vectors
from qjax.reparam.hadamard import hadamard_matrix, signs

NAMES = ("int4_g128", "Q4_0", "Q8_0", "Q4_K", "Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ4_NL", "NF4", "uint4_g64_zf16")
NAMES += ("uint8_g128", "int3_g64_mid_mse", "uint2_g64", "int8_row", "TQ2_0", "Q4_1", "MXFP4", "int3_g16_mse_u6x16")
NAMES_OF_VECTORS = tuple(test_point_kernels.CEILINGS)


@pytest.fixture(scope="module", autouse=True)
def hopper():
    found = [d for d in jax.devices() if d.platform == "gpu" and d.compute_capability == "9.0"]
    if not found:
        pytest.skip("no GPU of sm_90")
    return found[0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_sums_are_rounded_and_nothing_else(name, rng):
    fmt, leaves = products.weights(rng, name, 200, 1280)
    packed = prepack(fmt, leaves)
    for batch in (1, 9, 32, 64):
        x = products.inputs(rng, batch, 1280)
        y = jax.jit(accumulate)(x, packed)
        products.assert_rounded_sums(np.asarray(y), x, fmt, leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("name", supers.NAMES)
def test_integer_scales_too(name, rng):
    fmt, leaves = products.weights(rng, name, 200, 1280)
    packed = supers.prepack(fmt, leaves)
    for batch in (1, 9, 64):
        x = products.inputs(rng, batch, 1280)
        y = jax.jit(super_products.accumulate)(x, packed)
        products.assert_rounded_sums(np.asarray(y), x, fmt, leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES_OF_VECTORS)
def test_vectors_too(name, rng):
    fmt, leaves = test_point_kernels.leaves_of(rng, name, 208, 1280)
    packed = points.prepack(fmt, leaves)
    for batch in (1, 9, 64):
        x = products.inputs(rng, batch, 1280)
        y = jax.jit(vectors.accumulate)(x, packed)
        test_point_kernels.assert_rounded_sums(np.asarray(y), x, fmt, leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [16, 64, 128])
def test_the_transform_too(last, rng):
    x, s = products.inputs(rng, 5, 64 * last), signs(7, 64 * last)
    q, a = jax.jit(rotated)(x, s, jnp.asarray(hadamard_matrix(last)))
    test_gpu_hadamard.assert_codes(q, a, x, s)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [Plan(8, 256, 2, 1), Plan(8, 256, 4, 7), Plan(8, 512, 3, 2), Plan(16, 1792, 2, 2)])
def test_every_plan_gives_the_product(plan, rng):
    fmt, leaves = products.weights(rng, "int4_g128", 4096, 3584)
    x, packed = products.inputs(rng, 3, 3584), prepack(fmt, leaves)
    y = jax.jit(lambda x, packed: accumulate(x, packed, plan))(x, packed)
    products.assert_rounded_sums(np.asarray(y), x, fmt, leaves)


@pytest.mark.gpu
def test_a_scan_over_a_stack(rng):
    fmt, leaves = products.weights(rng, "Q4_K", 512, 512)
    packed = prepack(fmt, leaves)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), packed)
    x = products.inputs(rng, 2, 512)

    def step(x, packed):
        return matmul(x, packed), None

    y = jax.jit(lambda x, stack: jax.lax.scan(step, x, stack)[0])(x, stack)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(matmul(matmul(x, packed), packed)))
