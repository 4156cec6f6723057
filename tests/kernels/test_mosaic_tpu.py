"""The TPU kernels: against float64 as jnp runs them, and compiled for three TPUs where their compiler is at hand."""

import jax
import jax.numpy as jnp
import products
import pytest
import tpu_ahead

import qjax
from qjax.errors import UserError
from qjax.formats import format
from qjax.kernels.inputs import rounded
from qjax.kernels.layouts.columns import prepack
from qjax.kernels.mosaic_tpu import Plan, matmul, plan_for, twin
from qjax.kernels.mosaic_tpu.product import accumulate
from qjax.kernels.mosaic_tpu.tiles import VMEM, memory

# (format, rows, columns, batch, bits of x): ragged rows and columns, batches of several tiles
CASES = [
    ("int4_g128", 70, 384, 1, 16),
    ("Q4_K", 128, 1280, 17, 16),  # 640 divides it, and no super-block
    ("Q8_0", 64, 544, 9, 8),
    ("uint2_g64", 130, 576, 3, 8),
    ("Q6_K", 65, 256, 2, 16),
    ("Q6_K", 65, 256, 2, 8),
    ("IQ4_NL", 1, 224, 2, 16),
    ("uint4_g32", 66, 288, 4, 8),
    ("uint4_g64_zf16", 64, 128, 150, 16),
    ("uint8_g128", 64, 384, 2, 8),
    ("int8_row", 64, 360, 3, 16),
    ("uint4_row", 64, 40, 2, 16),
    ("uint4_row", 64, 2100, 2, 16),  # several steps under one scale and zero point
    ("int3_g64_mid_mse", 64, 640, 2, 16),
    ("Q3_K", 64, 512, 8, 8),
    ("Q4_1", 64, 160, 2, 16),
    ("TQ2_0", 64, 512, 1, 8),
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name, rows, columns, batch, bits", CASES, ids=lambda v: str(v))
def test_sums_are_rounded_and_nothing_else(name, rows, columns, batch, bits, rng):
    fmt, leaves = products.weights(rng, name, rows, columns)
    x, packed = products.inputs(rng, batch, columns), prepack(fmt, leaves)
    y, of_twin = accumulate(x, packed, input_bits=bits, interpret=True), twin(x, packed, bits)
    if bits == 16:
        products.assert_rounded_sums(y, x, fmt, leaves)
        products.assert_rounded_sums(of_twin, x, fmt, leaves)
    else:
        q, a = rounded(x)
        assert q.dtype == jnp.int8
        products.assert_rounded_sums(y / a[:, None], q, fmt, leaves)
        products.assert_rounded_sums(of_twin / a[:, None], q, fmt, leaves)


def test_several_tiles_of_everything(rng):
    fmt, leaves = products.weights(rng, "Q4_0", 256, 512)
    x, packed = products.inputs(rng, 40, 512), prepack(fmt, leaves)
    small = Plan(batch=16, outputs=128, inputs=128)
    products.assert_rounded_sums(accumulate(x, packed, small, interpret=True), x, fmt, leaves)
    y = matmul(x, packed, small, interpret=True)
    assert y.dtype == jnp.bfloat16 and y.shape == (40, 256)


def test_float32_inputs_lose_nothing(rng):
    fmt, leaves = products.weights(rng, "Q4_K", 64, 256)
    x, packed = products.exact(rng, 2, 256), prepack(fmt, leaves)
    y = matmul(x, packed, interpret=True)
    assert y.dtype == jnp.float32
    products.assert_rounded_sums(y, x, fmt, leaves)


def shapes(name, rows, columns):
    w = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    return jax.eval_shape(lambda w: prepack(format(name), qjax.quantize(w, name).leaves), w)


def test_plans_fit():
    for name in ("int4_g128", "Q8_0", "TQ2_0", "Q6_K", "int8_row"):
        for rows, columns in ((64, 512), (576, 1536), (14336, 4096), (8192, 28672), (100, 2304)):
            packed = shapes(name, rows, columns)
            for batch, x_bytes in ((1, 2), (8, 1), (300, 2), (300, 1)):
                plan = plan_for(batch, packed, x_bytes)
                K, N = packed.padded
                assert K % plan.inputs == 0 and N % plan.outputs == 0 and memory(packed, plan, x_bytes) <= VMEM
    assert plan_for(1, shapes("int4_g128", 512, 1152)) == Plan(16, 512, 384)


def test_what_does_not_fit_is_refused():
    packed, x = shapes("int4_g128", 8192, 8192), jax.ShapeDtypeStruct((16, 8192), jnp.bfloat16)
    with pytest.raises(UserError, match="bytes of VMEM, and a program has 16777216"):
        jax.eval_shape(lambda x, p: matmul(x, p, Plan(16, 8192, 4096)), x, packed)
    with pytest.raises(UserError, match="that divide the weights'"):
        jax.eval_shape(lambda x, p: matmul(x, p, Plan(16, 500, 1024)), x, packed)
    with pytest.raises(UserError, match="whole scales"):
        short = jax.ShapeDtypeStruct((16, 3072), jnp.bfloat16)
        jax.eval_shape(lambda x, p: matmul(x, p, Plan(16, 512, 384)), short, shapes("TQ2_0", 8192, 3072))
    with pytest.raises(UserError, match="x is float8_e4m3fn, not bfloat16, float16 or float32"):
        jax.eval_shape(matmul, jax.ShapeDtypeStruct((16, 8192), jnp.float8_e4m3fn), packed)
    with pytest.raises(UserError, match="input_bits must be 8 or 16, got 4"):
        jax.eval_shape(lambda x, p: matmul(x, p, input_bits=4), x, packed)
    with pytest.raises(UserError, match="NF4 has no TPU kernel: its levels are no sixteen integers"):
        shapes("NF4", 128, 128)


# Bundles of a step of 16 (int8: 32) x 1024 x 512, on v5e, v6e and tpu7x, as they stand; first and last step's code
# counted. bfloat16 weights take 470 on a v5e, whose memory gives a step of them 1918 cycles, of 4.25 bits 510.
BUNDLES = {
    ("int4_g128", 16): (574, 409, 373),
    ("int4_g128", 8): (378, 339, 461),
    ("int8_g128", 16): (548, 413, 381),
    ("int8_g128", 8): (374, 344, 465),
    ("int8_row", 8): (395, 308, 308),
    ("Q4_0", 16): (769, 618, 594),
    ("Q8_0", 8): (705, 670, 979),
    ("Q4_K", 16): (1139, 803, 811),
    ("Q6_K", 16): (1316, 862, 852),
    ("uint2_g64", 16): (752, 647, 595),
    ("IQ4_NL", 16): (751, 612, 592),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", tpu_ahead.TOPOLOGIES)
@pytest.mark.parametrize("name, bits", BUNDLES)
def test_compiled_for_a_tpu(name, bits, kind):
    """No temporaries, and no more instructions than there were."""
    packed = shapes(name, 14336, 4096)
    leaves, tree = jax.tree.flatten(packed)
    x = jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16)
    made, bundles = tpu_ahead.compiled(
        kind, lambda x, *leaves: accumulate(x, jax.tree.unflatten(tree, leaves), input_bits=bits), x, *leaves
    )
    assert made.memory_analysis().temp_size_in_bytes == 0
    assert made.memory_analysis().argument_size_in_bytes <= packed.bits_per_weight / 8 * 14336 * 4096 + 2**20
    ((_, count),) = bundles.items()
    assert count <= 1.05 * BUNDLES[name, bits][list(tpu_ahead.TOPOLOGIES).index(kind)]
